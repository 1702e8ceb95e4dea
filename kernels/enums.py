"""The choices that ops take as integers. `csrc/generate.py` writes the same enums for C++."""

from enum import IntEnum


class Location(IntEnum):
    """The place in its receptive field at which a point lands after the channel is chosen.

    PRODUCT: the largest activation times weight (Algorithm 2, line 8).
    CENTER: the middle of the window, `stride * y - padding + dilation * (K // 2)`.
    ACTIVATION: the largest activation (the authors' code, in the 3x3 convolutions of a ResNet).
    SAME: `stride * y` (the authors' code elsewhere); equal to CENTER where `K == 2 * padding + 1`.
    """

    PRODUCT = 0
    CENTER = 1
    ACTIVATION = 2
    SAME = 3


class Solver(IntEnum):
    """The algorithm that computes singular triplets.

    AUTO: GRAM while the small side is at most 1024, else SUBSPACE.
    GRAM: eigenvectors of the product of the matrix with its own transpose, to rounding. Backends are free not to form
        that product: the C++ finds them in a Krylov space (block Lanczos; Golub and Underwood, 1977), which takes a
        few passes over the matrix, and forms it where they lie too close to each other.
    SUBSPACE: randomized subspace iteration (Halko, Martinsson and Tropp, 2011, Algorithm 4.4).
    """

    AUTO = 0
    GRAM = 1
    SUBSPACE = 2


class Rectify(IntEnum):
    """The part of a gradient g that passes a rectifier.

    GRADIENT: g where the input was positive, the derivative.
    DECONVNET: g where g is positive, whatever the input was (Zeiler and Fergus, 2014).
    GUIDED: g where both are positive (Springenberg et al., 2015; Nie et al., 2018).
    """

    GRADIENT = 0
    DECONVNET = 1
    GUIDED = 2
