"""Systems composed from the parts, one a file."""

from fem_vi.models.amortised import AmortisedInversion as AmortisedInversion
from fem_vi.models.measure import Plain as Plain
from fem_vi.models.measure import Preconditioned as Preconditioned
from fem_vi.models.measure import SolutionUnits as SolutionUnits
from fem_vi.models.pddlvm import PDDLVM as PDDLVM
from fem_vi.models.pddlvm import FieldMoments as FieldMoments
from fem_vi.models.virtual_data import VirtualData as VirtualData
from fem_vi.models.virtual_data import VirtualELBO as VirtualELBO
