"""An aquifer seen from above: curved outline, a pumping well, a fault.

Lengths are in kilometres; the outline is about 2 km by 1.2 km.

    cells   aquifer  1
    facets  river    1   prescribed head, along the south-west
            inflow   2   prescribed flux, in the north
            no_flow  3   the rest of the outline, in two parts
            well     4   rim of the well: a hole of radius 20 m around (1.32, 0.58)
            fault    5   interior facets, a line that touches neither the outline nor the well

The mesh of `--size h/3` is finer everywhere, well and fault included: use it to make data.
"""

from __future__ import annotations

import gmsh
import gmsh_session

# Corners between the parts of the outline are written twice: the end of one part is the start of the next.
RIVER = [(0.10, 0.72), (0.06, 0.52), (0.14, 0.30), (0.36, 0.14), (0.62, 0.10), (0.86, 0.03)]
EAST = [(0.86, 0.03), (1.20, 0.00), (1.58, 0.08), (1.86, 0.26), (2.00, 0.52), (1.94, 0.80)]
INFLOW = [(1.94, 0.80), (1.76, 1.00), (1.44, 1.10), (1.14, 1.18), (0.84, 1.20)]
WEST = [(0.84, 1.20), (0.54, 1.13), (0.30, 0.98), (0.10, 0.72)]
FAULT = [(0.52, 0.34), (0.68, 0.50), (0.80, 0.66), (0.98, 0.86)]
WELL, RADIUS = (1.32, 0.58), 0.02


def spline(points: list[tuple[float, float]], ends: dict[tuple[float, float], int]) -> int:
    """A spline through the points; `ends` remembers the end points, so that neighbours share them."""
    tags = [ends[p] if p in ends else gmsh.model.geo.addPoint(*p, 0.0) for p in points]
    ends.update({points[0]: tags[0], points[-1]: tags[-1]})
    return int(gmsh.model.geo.addSpline(tags))


def main() -> None:
    """Write the mesh."""
    arguments = gmsh_session.options("aquifer", "Aquifer in 2D with a well and a fault.", size=0.045)
    with gmsh_session.model("aquifer"):
        ends: dict[tuple[float, float], int] = {}
        river, east, inflow, west = (spline(points, ends) for points in (RIVER, EAST, INFLOW, WEST))
        fault = spline(FAULT, {})
        well = gmsh_session.circle(WELL, RADIUS)
        outline = gmsh.model.geo.addCurveLoop([river, east, inflow, west])
        surface = gmsh.model.geo.addPlaneSurface([outline, gmsh.model.geo.addCurveLoop(well)])
        gmsh.model.geo.synchronize()
        gmsh.model.mesh.embed(1, [fault], 2, surface)
        gmsh_session.tag(2, "aquifer", 1, [surface])
        parts = {"river": [river], "inflow": [inflow], "no_flow": [east, west], "well": well, "fault": [fault]}
        for value, (name, curves) in enumerate(parts.items(), start=1):
            gmsh_session.tag(1, name, value, curves)
        gmsh_session.set_sizes(arguments.size, [(well, arguments.size / 5.0, 0.35), ([fault], arguments.size / 2.0, 0.2)])
        gmsh_session.write(arguments.out, dim=2, order=arguments.order)


if __name__ == "__main__":
    main()
