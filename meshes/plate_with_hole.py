"""A square plate with a circular hole, meshed with structured quadrilaterals.

The plate is [-1, 1] x [-1, 1] (lengths in units of half its side), the hole has radius 0.3 around the origin.

    cells   plate   1
    facets  left    1   x = -1
            right   2   x = +1
            bottom  3   y = -1
            top     4   y = +1
            hole    5   the circle

`--order 2` follows the circle with nine-node quadrilaterals.
"""

from __future__ import annotations

import math

import gmsh
import gmsh_session

RADIUS = 0.3
SIDES = ("right", "top", "left", "bottom")  # counterclockwise from x = +1, as the patches are made


def main() -> None:
    """Write the mesh."""
    arguments = gmsh_session.options("plate_with_hole", "Plate with a hole, quadrilaterals.", size=0.08)
    with gmsh_session.model("plate_with_hole"):
        geo = gmsh.model.geo
        middle = geo.addPoint(0.0, 0.0, 0.0)
        corners, rim = [], []
        for x, y in ((1, -1), (1, 1), (-1, 1), (-1, -1)):
            corners.append(geo.addPoint(x, y, 0.0))
            rim.append(geo.addPoint(x * RADIUS / math.sqrt(2.0), y * RADIUS / math.sqrt(2.0), 0.0))
        sides = [geo.addLine(corners[i], corners[(i + 1) % 4]) for i in range(4)]
        arcs = [geo.addCircleArc(rim[i], middle, rim[(i + 1) % 4]) for i in range(4)]
        spokes = [geo.addLine(rim[i], corners[i]) for i in range(4)]
        along, across = 1 + round(2.0 / arguments.size), 1 + round(0.9 / arguments.size)
        patches = []
        for i in range(4):
            loop = geo.addCurveLoop([spokes[i], sides[i], -spokes[(i + 1) % 4], -arcs[i]])
            patches.append(geo.addPlaneSurface([loop]))
            geo.mesh.setTransfiniteCurve(sides[i], along)
            geo.mesh.setTransfiniteCurve(arcs[i], along)
            geo.mesh.setTransfiniteCurve(spokes[i], across, "Progression", 1.08)
            geo.mesh.setTransfiniteSurface(patches[i])
            geo.mesh.setRecombine(2, patches[i])
        geo.synchronize()
        gmsh_session.tag(2, "plate", 1, patches)
        for value, name in enumerate(("left", "right", "bottom", "top"), start=1):
            gmsh_session.tag(1, name, value, [sides[SIDES.index(name)]])
        gmsh_session.tag(1, "hole", 5, arcs)
        gmsh_session.write(arguments.out, dim=2, order=arguments.order)


if __name__ == "__main__":
    main()
