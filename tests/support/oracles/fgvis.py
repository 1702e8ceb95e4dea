"""FGVis as the paper writes it (Wagner et al., 2019, section 3): one image at a time, with autograd."""

import torch


class Clipped(torch.autograd.Function):
    """Eq. 5 or, leaving the activation as it is, Eq. 6: a gradient passes within bounds, and on them."""

    @staticmethod
    def forward(ctx, h, low, high, clamp):
        ctx.save_for_backward((h <= high) & (h >= low))
        return torch.minimum(high, torch.maximum(low, h)) if clamp else h.clone()

    @staticmethod
    def backward(ctx, gradient):
        (within,) = ctx.saved_tensors
        return gradient * within, None, None, None


class Defended:
    """Calls `model(x, act)`, where `act(f, x)` is f(x) with its bounds held, call by call."""

    def __init__(self, model, image, defence):
        self.model, self.defence, self.bounds = model, defence, []
        with torch.no_grad():
            model(image, self.bound)

    def bound(self, function, x):
        h = function(x)
        self.bounds.append((torch.clamp(h, max=0), torch.clamp(h, min=0)))
        return h

    def __call__(self, e):
        at = iter(self.bounds)

        def act(function, x):
            h, (low, high) = function(x), next(at)
            return h if self.defence == "none" else Clipped.apply(h, low, high, self.defence == "forward")

        return self.model(e, act)


def play(model, image, reference, target, game, defence, similarity, sparsity, rate, iterations):
    """The masks of every iteration, before the step, and their scores; `sparsity` is one number an iteration."""
    defended = Defended(model, image, defence)
    start, sign = {"preservation": (1, 1), "deletion": (1, -1), "generation": (0, 1), "repression": (0, -1)}[game]
    m = torch.full_like(image, start)
    masks, scores = [], []
    for i in range(iterations):
        m = m.requires_grad_()
        e = m * image + (1 - m) * reference
        p = defended(e).softmax(1)[0, target]
        phi = -p.log() if similarity == "cross-entropy" else -p
        (gradient,) = torch.autograd.grad(phi, m)
        masks.append(m.detach())
        scores.append(p.item())
        if gradient.abs().max() > 0:
            gradient = gradient / gradient.abs().max()
        # The derivative of |m| is 1: m is never negative.
        m = (m.detach() - sign * rate * (gradient + sparsity[i])).clamp(0, 1)
    return masks, scores
