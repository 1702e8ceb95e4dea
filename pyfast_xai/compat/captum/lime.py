"""LIME (Ribeiro et al., 2016) and Kernel SHAP (Lundberg and Lee, 2017): linear models of samples around an input."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.utils.data import DataLoader, TensorDataset

from pyfast_xai.compat.called import Forward
from pyfast_xai.compat.captum.ablation import (
    check_at_once,
    common_dtype,
    number,
    recorded,
    reporter,
    select_or_number,
)
from pyfast_xai.compat.captum.arguments import (
    Baselines,
    Inputs,
    Target,
    as_tuple,
    baselines_for,
    further,
    like,
    refuse,
    repeated,
    repeated_further,
)
from pyfast_xai.compat.captum.attribution import Attribution
from pyfast_xai.compat.captum.feature_masks import FeatureMask, numbered_masks
from pyfast_xai.compat.captum.linear_models import Lasso, LinearModel, LinearRegression
from pyfast_xai.compat.captum.sample_outputs import SampleOutputs


@dataclass
class _Drawn:
    """Samples around an input.

    Attributes:
        target: which output counts.
        forms: the interpretable form of each.
        weights: the weight of each.
        outputs: their numbers, or the keys of the outputs in `shared`, some samples at a time.
        shared: computes outputs.
    """

    target: Target
    forms: list[Any] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor | list[bytes]] = field(default_factory=list)
    shared: SampleOutputs | None = None


class LimeBase(Attribution):
    """The coefficients of a model that is fitted to the outputs for samples around an input.

    Args:
        forward_func: a module or a function that gives a number a row, or one for the batch.
        interpretable_model: has `fit`, which takes a `DataLoader` of one batch of interpretable samples, outputs and
            weights, and `representation`, which returns the attributions.
        similarity_func: returns the weight of a sample, of the inputs, the sample as an input, its interpretable form
            and the further keyword arguments.
        perturb_func: returns a sample, of the inputs and the further keyword arguments; or a generator of samples.
        perturb_interpretable_space: samples are interpretable forms, not inputs.
        from_interp_rep_transform: returns the input of an interpretable form, the inputs and the keyword arguments.
        to_interp_rep_transform: returns the interpretable form of an input, the inputs and the keyword arguments.

    Raises:
        InputError: the transform that is needed is None.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import LimeBase
        >>> from pyfast_xai.compat.captum.linear_models import LinearRegression
        >>> explain = LimeBase(
        ...     demo.load(),
        ...     LinearRegression(),
        ...     similarity_func=lambda inputs, sample, form, **kwargs: 1.0,
        ...     perturb_func=lambda inputs, **kwargs: torch.randint(2, (1, 3)),
        ...     perturb_interpretable_space=True,
        ...     from_interp_rep_transform=lambda form, inputs, **kwargs: inputs * form[..., None, None],
        ...     to_interp_rep_transform=None,
        ... )
        >>> explain.attribute(torch.rand(1, 3, 96, 96), target=3, n_samples=8).shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        forward_func: Forward,
        interpretable_model: Any,
        similarity_func: Callable[..., Any],
        perturb_func: Callable[..., Any],
        perturb_interpretable_space: bool,
        from_interp_rep_transform: Callable[..., Any] | None,
        to_interp_rep_transform: Callable[..., Any] | None,
    ) -> None:
        super().__init__(forward_func)
        self.interpretable_model, self.similarity_func = interpretable_model, similarity_func
        self.perturb_func, self.perturb_interpretable_space = perturb_func, perturb_interpretable_space
        self.from_interp_rep_transform, self.to_interp_rep_transform = (
            from_interp_rep_transform,
            to_interp_rep_transform,
        )
        needed = "from_interp_rep_transform" if perturb_interpretable_space else "to_interp_rep_transform"
        if getattr(self, needed) is None:
            refuse(f"{needed} must be given where perturb_interpretable_space is {perturb_interpretable_space}")

    def attribute(
        self,
        inputs: Inputs,
        target: Target = None,
        additional_forward_args: Any = None,
        n_samples: int = 50,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Attributes the output to the interpretable features.

        Args:
            inputs: a tensor `[1, ...]` or a tuple of them; `[N, ...]` where forward_func gives one number for a batch.
            target: see `FeatureAblation.attribute`.
            additional_forward_args: further arguments of the forward function.
            n_samples: number of samples of which the model is made.
            perturbations_per_eval: samples that go through the model at once; a replay of a model whose rows do not
                depend on each other takes up to 32 at once, see `compat.accelerate`.
            show_progress: write how far it is to stderr.
            **kwargs: passed on to the functions of the constructor.

        Returns:
            What `interpretable_model.representation` returns.

        Raises:
            InputError: arguments that do not fit, or more than one number a sample.
        """
        check_at_once(perturbations_per_eval)
        with torch.no_grad():
            drawn = self._drawn(
                inputs, target, additional_forward_args, n_samples, perturbations_per_eval, show_progress, kwargs
            )
            return self._fitted(drawn)

    def _drawn(
        self,
        inputs: Inputs,
        target: Target,
        additional_forward_args: Any,
        n_samples: int,
        perturbations_per_eval: int,
        show_progress: bool,
        kwargs: dict[str, Any],
        shared: SampleOutputs | None = None,
    ) -> "_Drawn":
        """Returns samples, and what computes their outputs; see `attribute`.

        Args:
            inputs: likewise.
            target: likewise.
            additional_forward_args: likewise.
            n_samples: likewise.
            perturbations_per_eval: likewise.
            show_progress: likewise.
            kwargs: likewise.
            shared: computes outputs for samples of all rows, the first one's too; None to see whether it may.
        """
        chunks = math.ceil(n_samples / perturbations_per_eval)
        report = reporter(f"{self.get_name()} attribution", chunks) if show_progress else None
        more = further(additional_forward_args)
        call: Callable[..., Any] | None = None
        drawn, batch = _Drawn(target), []
        samples = self._samples(inputs, kwargs)
        for done in range(1, n_samples + 1):
            sample = next(samples, None)
            if sample is None:
                warnings.warn(f"perturb_func ended before n_samples={n_samples}", stacklevel=2)
            else:
                form, changed = sample
                drawn.forms.append(form)
                batch.append(as_tuple(changed))
                drawn.weights.append(torch.as_tensor(self.similarity_func(inputs, changed, form, **kwargs)).flatten())
            if batch and (sample is None or len(batch) == perturbations_per_eval or done == n_samples):
                count = len(batch)
                if shared is None:
                    rows = [torch.cat(parts) for parts in zip(*batch, strict=True)]
                    args = (*rows, *repeated_further(more, count))
                    if call is None:
                        call, answer, tape = recorded(self.forward_func, args)
                        if len(args) == 1 and len(rows[0]) == count:
                            shared = SampleOutputs.of(
                                self.forward_func, tape, rows[0], n_samples - count, perturbations_per_eval
                            )
                    else:
                        answer = call(*args)
                    drawn.outputs.append(self._output(answer, repeated(target, count), count))
                else:
                    drawn.outputs.append([shared.add(image) for (image,) in batch])
                batch = []
                if report is not None:
                    report(len(drawn.outputs))
            if sample is None:
                break
        drawn.shared = shared
        return drawn

    def _fitted(self, drawn: "_Drawn") -> Any:
        """Returns what the interpretable model makes of samples."""
        answers = torch.cat([self._numbers(output, drawn) for output in drawn.outputs])
        answers = answers.to(torch.promote_types(answers.dtype, torch.float32))
        dataset = TensorDataset(torch.cat(drawn.forms).to(answers), answers, torch.cat(drawn.weights).to(answers))
        self.interpretable_model.fit(DataLoader(dataset, batch_size=len(drawn.forms)))
        return self.interpretable_model.representation()

    def _numbers(self, output: Tensor | list[bytes], drawn: "_Drawn") -> Tensor:
        if isinstance(output, Tensor):
            return output
        assert drawn.shared is not None
        answers = torch.cat([drawn.shared[key] for key in output])
        return self._output(answers, repeated(drawn.target, len(output)), len(output))

    def _samples(self, inputs: Inputs, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        """Yields the interpretable form of each sample, and the sample as an input."""
        generator = self.perturb_func(inputs, **kwargs) if inspect.isgeneratorfunction(self.perturb_func) else None
        while True:
            try:
                drawn = self.perturb_func(inputs, **kwargs) if generator is None else next(generator)
            except StopIteration:
                return
            if self.perturb_interpretable_space:
                assert self.from_interp_rep_transform is not None
                yield drawn, self.from_interp_rep_transform(drawn, inputs, **kwargs)
            else:
                assert self.to_interp_rep_transform is not None
                yield self.to_interp_rep_transform(drawn, inputs, **kwargs), drawn

    def _output(self, answer: Any, target: Target, count: int) -> Tensor:
        output = number(select_or_number(answer, target))
        if output.numel() != count:
            refuse(f"forward_func must return one number for each of {count} samples, got {list(output.shape)}")
        return output.flatten()


def get_exp_kernel_similarity_function(
    distance_mode: str = "cosine", kernel_width: float = 1.0
) -> Callable[..., float]:
    """Returns a function that weighs a sample by an exponential kernel on its distance to the inputs.

    Args:
        distance_mode: "cosine" or "euclidean", between all numbers of the inputs.
        kernel_width: width of the kernel.

    Raises:
        InputError: another mode.
    """
    if distance_mode not in ("cosine", "euclidean"):
        refuse(f"distance_mode must be 'cosine' or 'euclidean', got {distance_mode!r}")

    def weight(inputs: Inputs, sample: Inputs, form: Any, **kwargs: Any) -> float:
        one, other = (torch.cat([part.flatten() for part in as_tuple(tensors)]).float() for tensors in (inputs, sample))
        if distance_mode == "cosine":
            distance = 1 - torch.nn.functional.cosine_similarity(one, other, dim=0)
        else:
            distance = (one - other).norm()
        return math.exp(-(float(distance) ** 2) / (2 * kernel_width**2))

    return weight


def _fair_coins(inputs: Inputs, **kwargs: Any) -> Tensor:
    """Returns which features are present, `[1, F]`."""
    return torch.bernoulli(torch.full((1, kwargs["num_interp_features"]), 0.5)).to(as_tuple(inputs)[0].device).long()


def _with_features(form: Tensor, inputs: Inputs, **kwargs: Any) -> Any:
    """Returns the inputs with the features of a sample and the baselines elsewhere."""
    masks, baselines = as_tuple(kwargs["feature_mask"]), kwargs["baselines"]
    hidden = baselines if isinstance(baselines, tuple) else (baselines,)
    results = []
    for tensor, mask, baseline in zip(as_tuple(inputs), masks, hidden, strict=True):
        kind = common_dtype(tensor, baseline)
        filled = torch.as_tensor(baseline, dtype=kind, device=tensor.device)
        results.append(torch.where(form[0][mask].bool(), tensor.to(kind), filled))
    return like(inputs, results)


class Lime(LimeBase):
    """Coefficients of a linear model of which features are present (Ribeiro et al., 2016).

    Args:
        forward_func: a module or a function that gives a number a row, or one for the batch.
        interpretable_model: see `LimeBase`; None for `linear_models.Lasso` with a penalty of 0.01.
        similarity_func: see `LimeBase`; None for a kernel of width 1 on the cosine distance.
        perturb_func: see `LimeBase`; None for fair coins, from the random numbers of the process.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import Lime
        >>> mask = torch.arange(4).view(2, 2).repeat_interleave(48, 0).repeat_interleave(48, 1)
        >>> Lime(demo.load()).attribute(torch.rand(1, 3, 96, 96), target=3, feature_mask=mask).shape
        torch.Size([1, 3, 96, 96])
    """

    def __init__(
        self,
        forward_func: Forward,
        interpretable_model: Any = None,
        similarity_func: Callable[..., Any] | None = None,
        perturb_func: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(
            forward_func,
            Lasso(alpha=0.01) if interpretable_model is None else interpretable_model,
            get_exp_kernel_similarity_function() if similarity_func is None else similarity_func,
            _fair_coins if perturb_func is None else perturb_func,
            True,
            _with_features,
            None,
        )

    def attribute(  # type: ignore[override]
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        feature_mask: FeatureMask = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        return_input_shape: bool = True,
        show_progress: bool = False,
    ) -> Any:
        """Attributes the output to the inputs.

        Args:
            inputs: a tensor `[N, ...]` or a tuple of them; each row has a model of its own.
            baselines: what absent elements are, one an input: a number, a row for all, or of the input's shape.
            target: see `FeatureAblation.attribute`.
            additional_forward_args: further arguments of the forward function.
            feature_mask: see `FeatureAblation.attribute`.
            n_samples: number of samples of each model.
            perturbations_per_eval: samples that go through the model at once; a replay of a model whose rows do not
                depend on each other takes up to 32 at once, see `compat.accelerate`.
            return_input_shape: return the coefficient of the feature of each element, not one a feature.
            show_progress: write how far it is to stderr.

        Returns:
            Of the shape of the inputs, or `[N, F]`; where forward_func gives one number for the batch, one row.

        Raises:
            InputError: arguments that do not fit.
        """
        masks, count = numbered_masks(feature_mask, as_tuple(inputs))
        return self._by_row(
            inputs,
            baselines,
            target,
            additional_forward_args,
            masks,
            return_input_shape,
            n_samples=n_samples,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            num_interp_features=count,
        )

    def _by_row(
        self,
        inputs: Inputs,
        baselines: Baselines,
        target: Target,
        additional_forward_args: Any,
        masks: tuple[Tensor, ...],
        return_input_shape: bool,
        n_samples: int,
        perturbations_per_eval: int,
        show_progress: bool,
        **settings: Any,
    ) -> Any:
        check_at_once(perturbations_per_eval)
        tensors = tuple(tensor.detach() for tensor in as_tuple(inputs))
        several, count = isinstance(inputs, tuple), len(tensors[0])
        more = further(additional_forward_args)
        groups: list[tuple[Any, ...]] = [tensors, more, baselines_for(baselines, tensors), masks, (target,)]
        fits, coefficients = [], []
        with torch.no_grad():
            by_row, shared = self._by_rows(tensors, target, more, n_samples, perturbations_per_eval)
            ahead = shared is not None and type(self.interpretable_model) in (Lasso, LinearRegression)
            parts = [
                [tuple(one if n is None else _row(one, n, count) for one in group) for group in groups]
                for n in (range(count) if by_row else [None])
            ]
            for rows, row_more, hidden, row_masks, (row_target,) in parts:
                functions = {
                    "baselines": hidden if several else hidden[0],
                    "feature_mask": row_masks if several else row_masks[0],
                    **settings,
                }
                drawn = self._drawn(
                    rows if several else rows[0],
                    row_target,
                    row_more,
                    n_samples,
                    perturbations_per_eval,
                    show_progress,
                    functions,
                    shared,
                )
                if ahead:
                    # The samples of the next rows are drawn before this model is fitted, so that batches are full.
                    fits.append((drawn, torch.get_rng_state()))
                    LinearModel.draw(len(drawn.forms[0][0]))
                else:
                    coefficients.append(self._fitted(drawn).flatten())
            for drawn, state in fits:
                with torch.random.fork_rng(devices=[]):
                    torch.set_rng_state(state)
                    coefficients.append(self._fitted(drawn).flatten())
        if not return_input_shape:
            return torch.stack(coefficients)
        attributions = []
        for i, tensor in enumerate(tensors):
            shapes = [values[part[3][i][:1]] for values, part in zip(coefficients, parts, strict=True)]
            attributions.append(torch.cat([shape.expand(1, *tensor.shape[1:]) for shape in shapes]))
        return like(inputs, attributions)

    def _by_rows(
        self,
        inputs: tuple[Tensor, ...],
        target: Target,
        more: tuple[Any, ...],
        n_samples: int,
        perturbations_per_eval: int,
    ) -> tuple[bool, SampleOutputs | None]:
        """Returns whether the forward function gives a number a row, of several, and what may compute these then."""
        count = len(inputs[0])
        if count == 1:
            return False, None
        _, answer, tape = recorded(self.forward_func, (*inputs, *more))
        numbers = number(select_or_number(answer, target)).numel()
        if numbers not in (1, count):
            refuse(f"forward_func must return one number a row or one for the batch, got {numbers} for {count} rows")
        if numbers == 1 or len(inputs) > 1 or more:
            return numbers == count, None
        forwards = n_samples * count
        return True, SampleOutputs.of(self.forward_func, tape, inputs[0], forwards, perturbations_per_eval)


class KernelShap(Lime):
    """Shapley values of features, by a linear model of samples (Lundberg and Lee, 2017).

    Numbers are Captum's: sizes of samples are drawn by the Shapley kernel, and the empty and the whole input weigh a
    million times as much as a sample. `pyfast_xai.KernelShap` solves the same with the sum fixed, and draws in pairs.

    Args:
        forward_func: see `Lime`.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> from pyfast_xai.compat.captum import KernelShap
        >>> mask = torch.arange(4).view(2, 2).repeat_interleave(48, 0).repeat_interleave(48, 1)
        >>> KernelShap(demo.load()).attribute(torch.rand(1, 3, 96, 96), target=3, feature_mask=mask).shape
        torch.Size([1, 3, 96, 96])
    """

    def __init__(self, forward_func: Forward) -> None:
        super().__init__(
            forward_func, LinearRegression(), self.kernel_shap_similarity_kernel, self.kernel_shap_perturb_generator
        )
        self.inf_weight = 1_000_000.0

    def attribute(  # type: ignore[override]
        self,
        inputs: Inputs,
        baselines: Baselines = None,
        target: Target = None,
        additional_forward_args: Any = None,
        feature_mask: FeatureMask = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        return_input_shape: bool = True,
        show_progress: bool = False,
    ) -> Any:
        """Attributes the output to the inputs; see `Lime.attribute`.

        The first samples are the whole and the empty input.
        """
        masks, count = numbered_masks(feature_mask, as_tuple(inputs))
        sizes = torch.arange(count, dtype=torch.float32)
        shares = (count - 1) / (sizes * (count - sizes))
        shares[0] = 0
        return self._by_row(
            inputs,
            baselines,
            target,
            additional_forward_args,
            masks,
            return_input_shape,
            n_samples=n_samples,
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            num_interp_features=count,
            num_select_distribution=Categorical(shares),
        )

    def kernel_shap_similarity_kernel(self, _: Any, __: Any, interpretable_sample: Tensor, **kwargs: Any) -> Tensor:
        """Returns the weight of a sample, `[1]`."""
        size = int(interpretable_sample.sum())
        return torch.tensor([self.inf_weight if size in (0, kwargs["num_interp_features"]) else 1.0])

    def kernel_shap_perturb_generator(self, original_inp: Inputs, **kwargs: Any) -> Iterator[Tensor]:
        """Yields which features are present, `[1, F]`: all, none, and then as many as were drawn."""
        device, features = as_tuple(original_inp)[0].device, kwargs["num_interp_features"]
        yield torch.ones(1, features, device=device, dtype=torch.long)
        yield torch.zeros(1, features, device=device, dtype=torch.long)
        while True:
            size = int(kwargs["num_select_distribution"].sample())
            drawn = torch.randn(1, features)
            threshold = torch.kthvalue(drawn, features - size).values
            yield (drawn > threshold).to(device).long()


def _row(argument: Any, n: int, count: int) -> Any:
    """Returns the part of an argument that belongs to a row, where it has one for each of so many rows."""
    if isinstance(argument, list) or (isinstance(argument, Tensor) and argument.dim()):
        return argument[n : n + 1] if len(argument) == count else argument
    return argument
