"""Variational inference for PDEs on meshes: FEniCSx solvers and weak forms as differentiable PyTorch functions."""

from fem_vi.bridge.field_file import write_fields
from fem_vi.bridge.field_prior import MaternField
from fem_vi.bridge.functional import Functional
from fem_vi.bridge.layout import all_sum, distribute, gather, localise
from fem_vi.bridge.observe import MaskOutside, PointObservation, RaiseOutside
from fem_vi.bridge.residual import Residual
from fem_vi.bridge.solve import Solve
from fem_vi.errors import (
    FailedOnAnotherRank,
    FemViError,
    InvalidInput,
    MeshError,
    PointsOutsideMesh,
    RunFolderError,
    SolveFailed,
    UnsupportedDerivative,
    UnsupportedForm,
)
from fem_vi.parallel import ProcessGrid
from fem_vi.pde.weak_form import WeakForm

__version__ = "0.1.0"
