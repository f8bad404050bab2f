"""Every error that a user of fem_vi can meet.

An error says what was given, what was expected, and what to do about it.
"""

from __future__ import annotations


class FemViError(Exception):
    """Base class of all errors that fem_vi raises on purpose."""


class InvalidInput(FemViError, ValueError):
    """A value passed to fem_vi has the wrong shape, type, layout or content."""


class UnsupportedForm(FemViError, ValueError):
    """A weak form uses something that the requested operator cannot handle."""


class UnsupportedDerivative(FemViError, RuntimeError):
    """A derivative was asked for that an operator cannot give; it is refused rather than wrong."""


class CompilerFailed(FemViError, RuntimeError):
    """The C compiler, which makes the kernels of `CompiledKernel`, is missing or refused what it was given."""


class MeshError(FemViError, ValueError):
    """A mesh file is missing, damaged, or describes something that DOLFINx cannot represent."""


class PointsOutsideMesh(FemViError, ValueError):
    """Observation points lie in no cell of the mesh."""


class SolveFailed(FemViError, RuntimeError):
    """A linear or nonlinear solve did not converge."""


class NotFinite(FemViError, ArithmeticError):
    """A loss, a gradient or an integral is infinite or not a number."""


class RunFolderError(FemViError, RuntimeError):
    """A run folder or checkpoint cannot be written, or cannot be trusted when read."""


class ResidualFileError(FemViError, RuntimeError):
    """A file of a residual cannot be written, or cannot be trusted when read."""


class FitInterrupted(FemViError, KeyboardInterrupt):
    """A signal ended a fit between two steps, after a checkpoint was written; the message says how to go on."""


class FailedOnAnotherRank(FemViError, RuntimeError):
    """Another MPI rank raised an error that this rank has no class for; the message quotes it."""
