"""Extension of Griffe: the section `Example:` of a docstring is one of code, which Griffe expects as `Examples:`."""

import re

import griffe


class Examples(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
