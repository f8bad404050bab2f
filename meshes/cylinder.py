"""A channel with a circular cylinder in it: the domain of the benchmark DFG 2D-1, flow around a cylinder.

Lengths are in metres: the channel is [0, 2.2] x [0, 0.41], the cylinder has radius 0.05 around (0.2, 0.2).

    cells   fluid     1
    facets  inflow    1   x = 0
            outflow   2   x = 2.2
            walls     3   y = 0 and y = 0.41
            cylinder  4   the circle

The geometry is of order 2 unless `--order` says otherwise: with straight edges the error of the drag would be that of
a polygon. The ends of the circle's horizontal diameter, (0.15, 0.2) and (0.25, 0.2), are vertices.

Schaefer, Turek (1996), Benchmark computations of laminar flow around a cylinder.
"""

from __future__ import annotations

import gmsh
import gmsh_session

LENGTH, HEIGHT = 2.2, 0.41
CENTRE, RADIUS = (0.2, 0.2), 0.05


def main() -> None:
    """Write the mesh."""
    arguments = gmsh_session.options("cylinder", "Channel with a cylinder in it.", size=0.08, order=2)
    with gmsh_session.model("cylinder"):
        geo = gmsh.model.geo
        corners = [geo.addPoint(x, y, 0.0) for x, y in ((0.0, 0.0), (LENGTH, 0.0), (LENGTH, HEIGHT), (0.0, HEIGHT))]
        bottom, outflow, top, inflow = (geo.addLine(corners[i], corners[(i + 1) % 4]) for i in range(4))
        circle = gmsh_session.circle(CENTRE, RADIUS)
        outline = geo.addCurveLoop([bottom, outflow, top, inflow])
        fluid = geo.addPlaneSurface([outline, geo.addCurveLoop(circle)])
        geo.synchronize()
        gmsh_session.tag(2, "fluid", 1, [fluid])
        parts = {"inflow": [inflow], "outflow": [outflow], "walls": [bottom, top], "cylinder": circle}
        for value, (name, curves) in enumerate(parts.items(), start=1):
            gmsh_session.tag(1, name, value, curves)
        gmsh_session.set_sizes(arguments.size, [(circle, arguments.size / 10.0, 0.4), ([bottom, top], arguments.size / 2.0, 0.2)])
        gmsh_session.write(arguments.out, dim=2, order=arguments.order)


if __name__ == "__main__":
    main()
