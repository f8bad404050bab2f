"""Features of full fields on a mesh, by messages between neighbouring nodes.

A network of its own and no library's, because what is needed is little: on one fixed graph, sums over neighbours are products
with a few sparse matrices, made once, that act on all data sets of a batch together. (torch_geometric and DGL are made for graphs
that change from one datum to the next, and would be heavy dependencies.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fem_vi.arguments import instance, whole
from fem_vi.errors import InvalidInput
from fem_vi.vi.encoder.encoder import Encoder, dense, scales_of


class GraphEncoder(Encoder):
    """A function of fields given by their values at the nodes of a mesh.

        h_i <- h_i + g(h_i, mean_j (h_j - h_i), mean_j (x_j - x_i) (h_j - h_i) / d),   c_k = mean_i a_k(x_i) (y_i, h_i)

    over the neighbours j of node i: averages and slopes, so that a layer sees a field's derivatives. Pooling weighs nodes by
    their place, and so keeps where things are; the weights a_k begin as cosine waves, the longest first, and are learnt. Features
    are a dense network's of all c_k, and the means of y itself beside them. Renumbering the nodes changes nothing.

    On several ranks it works on gathered fields, the same everywhere: `lambda m: fem_vi.gather(solve(m), V)` as forward map.

    Args:
        points: Coordinates of the nodes, `(num_nodes, dim)`.
        edges: Pairs of neighbours, both directions, `(2, num_edges)`; both from `mesh_graph(V)`.
        channels: Values at each node; y is `(*batch, num_nodes * channels)`, node by node.
        width: Of what each node holds.
        layers: Of messages.
        queries: Weighings of the nodes.
        features: Of the dense network.

    Attributes:
        mean, std: Of the values in the training data, `(num_nodes * channels,)` and `(channels,)`; set once, by `scale_by`.

    Raises:
        InvalidInput: Where sizes are no whole numbers, or points and edges do not fit each other.

    MPI: Not collective; parameters are replicated, in float64, drawn from torch's generator.

    References:
        Gilmer, Schoenholz, Riley, Vinyals, Dahl (2017), Neural message passing for quantum chemistry.
        Beaini, Passaro, Letourneau, Hamilton, Corso, Lio (2021), Directional graph networks.

    Example:
        >>> encoder = GraphEncoder(*fem_vi.mesh_graph(V))
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        points: Tensor,
        edges: Tensor,
        *,
        channels: int = 1,
        width: int = 16,
        layers: int = 2,
        queries: int = 16,
        features: int = 64,
    ) -> None:
        super().__init__(whole("features", features, least=1) + whole("queries", queries, least=1) * channels)
        self.channels, self.num_nodes = whole("channels", channels, least=1), _checked_graph(points, edges)
        place = (points - points.mean(0)) / points.std(0).clamp_min(1e-12)
        self.operators = _operators(points.to(torch.float64), edges)
        self.register_buffer("place", place.to(torch.float64), persistent=False)
        self.lift = dense([self.channels + place.shape[1], whole("width", width, least=1)])
        inputs = width * (1 + len(self.operators))
        self.updates = nn.ModuleList(dense([inputs, width]) for _ in range(whole("layers", layers, least=0)))
        self.weigh = nn.Sequential(dense([place.shape[1], 32]), nn.Linear(32, queries, dtype=torch.float64))
        for parameter in self.weigh[-1].parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("waves", _waves(points.to(torch.float64), queries), persistent=False)
        self.last = dense([queries * (width + self.channels), 2 * features, features])
        self.register_buffer("mean", torch.zeros(self.num_nodes * self.channels, dtype=torch.float64))
        self.register_buffer("std", torch.ones(self.channels, dtype=torch.float64))

    @torch.no_grad()
    def scale_by(self, y: Any) -> None:
        """Take the mean at each node, and the standard deviation of each channel over all nodes."""
        mean, _ = scales_of(y)
        self.mean.copy_(mean)
        self.std.copy_(scales_of((y - mean).reshape(-1, self.channels))[1])
        self.is_scaled.fill_(True)

    def forward(self, y: Any) -> Tensor:
        """Features, `(*batch, num_features)`, of fields `(*batch, num_nodes * channels)`."""
        if not isinstance(y, Tensor) or y.ndim == 0 or y.shape[-1] != len(self.mean):
            given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise InvalidInput(
                f"GraphEncoder: y is {given}; it must be a tensor (*batch, {len(self.mean)}): {self.channels} values at "
                f"{self.num_nodes} nodes."
            )
        batch = y.shape[:-1]
        values = ((y - self.mean).reshape(-1, self.num_nodes, self.channels) / self.std).movedim(0, 1)  # (nodes, sets, channels)
        place = self.get_buffer("place")[:, None, :].expand(-1, values.shape[1], -1)
        h = self.lift(torch.cat([values, place], dim=-1))
        for update in self.updates:
            flat = h.flatten(1)
            around = [torch.sparse.mm(operator, flat).view_as(h) for operator in self.operators]
            h = h + update(torch.cat([h, *around], dim=-1))
        weights = self.get_buffer("waves") + self.weigh(self.get_buffer("place"))  # (nodes, queries)
        pooled = torch.einsum("nq,nbw->bqw", weights / self.num_nodes, torch.cat([values, h], dim=-1))
        features = torch.cat([self.last(pooled.flatten(1)), pooled[..., : self.channels].flatten(1)], dim=-1)
        return features.reshape(*batch, self.num_features)


def _operators(points: Tensor, edges: Tensor) -> list[Tensor]:
    """Mean difference to the neighbours, and its first moment along each axis, as sparse matrices `(n, n)`."""
    target, source = edges
    n = len(points)
    degree = torch.bincount(target, minlength=n).clamp_min(1).to(torch.float64)
    offset = points[source] - points[target]
    length = offset.square().sum(-1).mean().sqrt()
    operators = []
    axes = [offset[:, k] / length for k in range(points.shape[1]) if bool(offset[:, k].abs().max() > 1e-12 * length)]
    for weight in (torch.ones_like(offset[:, 0]), *axes):
        weight = weight / degree[target]
        diagonal = torch.zeros(n, dtype=torch.float64).index_add(0, target, weight)
        row = torch.cat([target, torch.arange(n)])
        column = torch.cat([source, torch.arange(n)])
        place, values = torch.stack([row, column]), torch.cat([weight, -diagonal])
        operators.append(torch.sparse_coo_tensor(place, values, (n, n), check_invariants=True).coalesce())
    return operators


def _waves(points: Tensor, count: int) -> Tensor:
    """Products of cosines over the bounding box, the longest waves first, `(n, count)`."""
    extent = points.amax(0) - points.amin(0)
    axes = (extent > 1e-12 * extent.max()).nonzero().flatten()
    unit = ((points - points.amin(0)) / extent.clamp_min(1e-300))[:, axes]
    most = math.ceil(count ** (1.0 / len(axes))) + 1
    numbers = torch.cartesian_prod(*[torch.arange(most + 1, dtype=torch.float64)] * len(axes)).reshape(-1, len(axes))
    wavelengths = numbers / extent[axes]
    lowest = numbers[wavelengths.square().sum(-1).argsort(stable=True)[:count]]
    return 2.0 * torch.cos(math.pi * unit[:, None, :] * lowest).prod(-1)


def _checked_graph(points: Tensor, edges: Tensor) -> int:
    """The number of nodes."""
    instance("points", points, Tensor)
    instance("edges", edges, Tensor)
    if points.ndim != 2 or len(points) < 2 or edges.ndim != 2 or len(edges) != 2:
        raise InvalidInput(
            f"GraphEncoder: points has shape {tuple(points.shape)} and edges {tuple(edges.shape)}; they must be (num_nodes, dim) "
            "and (2, num_edges), as mesh_graph(V) gives them."
        )
    if edges.numel() and (int(edges.min()) < 0 or int(edges.max()) >= len(points)):
        raise InvalidInput(f"GraphEncoder: edges name node {int(edges.max())}; there are {len(points)}.")
    return len(points)
