"""CNN-Fixations, section IV-B: the evidence for the words of a caption, by a small Show and Tell.

The captioner learns in about a minute. Its captions are made by rule of the annotations, the largest objects
first ("a toilet and a sink"), for captions that people wrote are not needed to ask where a word comes from.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyfast_xai import render
from pyfast_xai.errors import InputError
from pyfast_xai.evaluation import Annotation, Centre
from pyfast_xai.explainers import CNNFixations, Explainer, GradCAM
from pyfast_xai.explanation import Explanation
from pyfast_xai.models import LoadedModel
from pyfast_xai.reproduce.data import Data
from pyfast_xai.reproduce.outcome import Outcome
from pyfast_xai.reproduce.protocol import mean_of, rows_of
from pyfast_xai.reproduce.transfer import last_features

# Words for classes of ILSVRC, as the first and the last class of each span.
WORDS: dict[str, Sequence[tuple[int, int]]] = {
    "bird": ((7, 24), (80, 100), (127, 146)),
    "dog": ((151, 268),),
    "cat": ((281, 285),),
    "fish": ((0, 6), (389, 397)),
    "lizard": ((38, 48),),
    "snake": ((52, 68),),
    "insect": ((300, 326),),
    "monkey": ((365, 384),),
    "bear": ((294, 297),),
    "elephant": ((101, 101), (385, 386)),
    "boat": (
        (472, 472),
        (484, 484),
        (554, 554),
        (576, 576),
        (625, 625),
        (780, 780),
        (814, 814),
        (871, 871),
        (914, 914),
    ),
    "car": ((436, 436), (511, 511), (627, 627), (656, 656), (717, 717), (751, 751), (817, 817)),
    "train": ((466, 466), (547, 547), (820, 820)),
}
START, END, ARTICLE, AND = "<start>", "<end>", "a", "and"
NAMED, FOLDS, STEPS, SIZE, SHEET = 3, 3, 300, 128, 6


class Captioner(nn.Module):
    """Show and Tell (Vinyals et al., 2015): an LSTM reads the embedding of the image, then the words before the next.

    Args:
        features: `[N, C, H, W]` to `[N, D]`.
        width: D.
        vocabulary: number of words.
    """

    def __init__(self, features: nn.Module, width: int, vocabulary: int) -> None:
        super().__init__()
        self.features = features
        self.image, self.word = nn.Linear(width, SIZE), nn.Embedding(vocabulary, SIZE)
        self.lstm = nn.LSTM(SIZE, SIZE, batch_first=True)
        self.scores = nn.Linear(SIZE, vocabulary)

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        """Returns the scores of the word that comes next, `[N, vocabulary]`, after words, int64 `[N, T]`."""
        return self.next_scores(self.features(images), words)[:, -1]

    def next_scores(self, features: Tensor, words: Tensor) -> Tensor:
        """Returns the scores of the word that follows each of the words, `[N, T, vocabulary]`."""
        read = torch.cat([self.image(features)[:, None], self.word(words)], 1)
        return self.scores(self.lstm(read)[0][:, 1:])


def caption_of(entry: Annotation) -> list[str]:
    """Returns a caption of the kinds of objects in a picture, the largest first, three at most."""
    areas: dict[str, float] = {}
    for kind, (x1, y1, x2, y2) in zip(entry.kinds, entry.boxes.tolist(), strict=True):
        areas[str(kind)] = areas.get(str(kind), 0) + (x2 - x1 + 1) * (y2 - y1 + 1)
    named = sorted(areas, key=lambda kind: -areas[kind])[:NAMED]
    return [word for i, kind in enumerate(named) for word in ((AND,) if i else ()) + (ARTICLE, kind)]


def train(
    features: Tensor, captions: Sequence[Sequence[str]], vocabulary: Sequence[str], network: nn.Module, data: Data
) -> Captioner:
    """Trains the captioner but for its network.

    Args:
        features: what the network gives for each picture, `[N, D]`.
        captions: the words of each.
        vocabulary: all words, `START` and `END` among them.
        network: `[N, C, H, W]` to `[N, D]`.
        data: for seed and progress.
    """
    numbers = {word: i for i, word in enumerate(vocabulary)}
    length = 1 + max(map(len, captions))
    read = torch.full((len(captions), length), numbers[END])
    for row, words in zip(read, captions, strict=True):
        row[: 1 + len(words)] = torch.tensor([numbers[word] for word in (START, *words)])
    read = read.to(features.device)
    # END after a caption is learnt where it comes first; what follows does not count.
    following = torch.cat([read[:, 1:], torch.full_like(read[:, :1], numbers[END])], 1)
    counted = read != numbers[END]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(data.seed)
        captioner = Captioner(nn.Identity(), features.shape[1], len(vocabulary)).to(features)
        optimizer = torch.optim.AdamW(captioner.parameters(), 3e-3, weight_decay=1e-2)
        for step in range(STEPS):
            # Features without a few of their channels: the pictures are few.
            optimizer.zero_grad()
            scores = captioner.next_scores(functional.dropout(features, 0.5), read)
            functional.cross_entropy(scores[counted], following[counted]).backward()
            optimizer.step()
            data.advance(f"training the captioner, step {step + 1} of {STEPS}", 0)
    captioner.features = network
    return captioner.eval()


def spoken(captioner: Captioner, features: Tensor, vocabulary: Sequence[str]) -> list[str]:
    """Returns the caption of a picture, its likeliest word at each step.

    Args:
        captioner: trained.
        features: of the picture, `[1, D]`.
        vocabulary: all words.
    """
    words = torch.tensor([[vocabulary.index(START)]], device=features.device)
    with torch.no_grad():
        for _ in range(3 * NAMED):
            word = captioner.next_scores(features, words)[:, -1].argmax(1)
            if vocabulary[int(word)] == END:
                break
            words = torch.cat([words, word[:, None]], 1)
    return [vocabulary[int(word)] for word in words[0, 1:]]


def captions(data: Data) -> Outcome:
    """Measures whether the evidence for the words of captions lies on their objects; trains captioners first."""
    scenes, things = _named(data.coco()), _named(map(_in_words, replace(data, count=None).imagenet()))
    pictures = [*scenes, *things]
    explained = [*scenes, *things[: data.at_most(40).count]]
    written = [caption_of(entry) for entry in pictures]
    vocabulary = [START, END, *sorted({word for words in written for word in words})]
    rows: list[list[str]] = []
    deviations: list[str] = []
    shown: dict[str, Any] = {}
    for loaded in data.networks(("googlenet",)):
        try:
            features, network = _features(loaded, data, pictures)
        except InputError as error:
            deviations.append(f"{loaded.name} is left out: {error}.")
            continue
        figures: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        words, right = 0, 0
        sheet: list[list[Tensor]] = []
        titles: list[list[str]] = []
        for fold in range(FOLDS):
            rest = [i for i in range(len(pictures)) if i % FOLDS != fold]
            captioner = train(features[rest], [written[i] for i in rest], vocabulary, network, data)
            for i in range(fold, len(pictures), FOLDS):
                entry = pictures[i]
                if entry not in explained:
                    continue
                caption = spoken(captioner, features[i : i + 1], vocabulary)
                things_said = [place for place, word in enumerate(caption) if word not in (ARTICLE, AND)]
                true = [place for place in things_said if caption[place] in entry.kinds]
                words, right = words + len(things_said), right + len(true)
                images = data.inputs([entry], loaded.preprocess)
                maps = []
                for place in true:
                    truth = [entry.of_class(caption[place])]
                    for method, (explainer, explanation) in _evidence(
                        captioner, images, caption, place, vocabulary
                    ).items():
                        hit = rows_of("pointing", explainer, explanation, truth, loaded.preprocess)
                        mass = torch.full((1,), torch.nan).double()
                        if entry.shapes:
                            mass = rows_of("relevance-mass", explainer, explanation, truth, loaded.preprocess)
                        figures["COCO" if entry.shapes else "ILSVRC", method].append((hit, mass))
                        if method == "CNN-Fixations":
                            maps.append(explanation.overlay(data.shown([entry], loaded.preprocess))[0])
                if entry.shapes and len(maps) > 1 and len(sheet) < SHEET:
                    sheet.append(maps[:NAMED])
                    titles.append([caption[place] for place in true[:NAMED]])
                data.advance(f"{loaded.name}, captions", 1)
        for (source, method), pairs in figures.items():
            hits, masses = (torch.cat(values) for values in zip(*pairs, strict=True))
            masses = masses[~masses.isnan()]
            cells = [
                mean_of(hits, data, scale=100, digits=1),
                mean_of(masses, data, scale=100, digits=1) if len(masses) else "-",
            ]
            rows.append([loaded.name, source, method, str(len(hits)), *cells])
        deviations.append(f"{loaded.name}: of {words} words that name a thing, {right} are right; these are explained.")
        if sheet:
            shown[loaded.name] = render.montage(sheet, titles=titles)
    deviations += [
        "The paper shows six captions of Show and Tell, trained on COCO's, and has no figures. Here a small one learns "
        f"captions made by rule of annotations ({', '.join(map(repr, _examples(written)))}), in {FOLDS} folds of "
        f"{len(scenes)} pictures of COCO and {len(things)} of ILSVRC, and explains those it did not learn from.",
        "A word is traced from its score on; the whole caption, as in the paper, from the largest element of the last "
        "state. Pointing is at the boxes of the word's objects, mass the share of the map on their masks; ± is half of "
        "the 95 % interval over words.",
    ]
    heads = ["network", "pictures of", "method", "words", "pointing, %", "mass on the mask, %"]
    return Outcome("CNN-Fixations, Fig. 6: the evidence for the words of a caption", heads, rows, deviations, shown)


def _examples(written: Sequence[Sequence[str]]) -> list[str]:
    return [" ".join(words) for words in (max(written, key=len), min(written, key=len))]


def _named(entries: Iterable[Annotation]) -> list[Annotation]:
    return [entry for entry in entries if entry.kinds]


def _in_words(entry: Annotation) -> Annotation:
    """Returns an annotation of ILSVRC with a word in place of the class, without kinds where there is none."""
    label = int(entry.label or 0)
    word = next((word for word, spans in WORDS.items() if any(a <= label <= b for a, b in spans)), None)
    return replace(entry, kinds=[] if word is None else [word] * len(entry.boxes))


def _features(loaded: LoadedModel, data: Data, pictures: Sequence[Annotation]) -> tuple[Tensor, nn.Module]:
    """Returns what the last layer of a network reads on the pictures, `[N, D]`, and the network without that layer."""
    parts = []
    for start in range(0, len(pictures), data.batch_size):
        part = pictures[start : start + data.batch_size]
        features, name = last_features(loaded.model, data.inputs(part, loaded.preprocess))
        parts.append(features)
        data.advance(f"{loaded.name}, features", len(part))
    network = copy.deepcopy(loaded.model)
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, nn.Identity())
    return torch.cat(parts), network


def _evidence(
    captioner: Captioner, images: Tensor, caption: Sequence[str], place: int, vocabulary: Sequence[str]
) -> dict[str, tuple[Explainer, Explanation]]:
    """Returns what each method shows for the word at a place of the caption of one picture."""
    numbers = torch.tensor([[vocabulary.index(word) for word in (START, *caption)]], device=images.device)
    before, word = numbers[:, : place + 1], int(numbers[0, place + 1])
    whole = CNNFixations(captioner, neuron=("lstm", (numbers.shape[1],)))
    explainers = {"centre": Centre(captioner), "Grad-CAM": GradCAM(captioner), "CNN-Fixations": CNNFixations(captioner)}
    explained = {name: (explainer, explainer(images, word, before)) for name, explainer in explainers.items()}
    return {**explained, "CNN-Fixations, the whole caption": (whole, whole(images, None, numbers))}
