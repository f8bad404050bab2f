"""Systems composed from the parts, one a file."""

from fem_vi.models.amortised import AmortisedInversion as AmortisedInversion
