"""An L-shaped bracket in 3D with a fillet in its re-entrant corner, meshed with tetrahedra.

Lengths are in units of the leg's length: legs 1 long and 0.3 thick, width 0.4, fillet radius 0.1.

    cells   bracket  1
    facets  clamped  1   top of the upright leg, y = 1
            load     2   end of the lying leg, x = 1
            fillet   3   the quarter cylinder in the corner
            free     4   all other faces
"""

from __future__ import annotations

import gmsh
import gmsh_session

LEG, THICK, WIDTH, RADIUS = 1.0, 0.3, 0.4, 0.1


def profile(size: float) -> int:
    """The L in the plane z = 0, walked counterclockwise; cells are half as large at the fillet."""
    corner = THICK + RADIUS
    outline = [(0.0, 0.0), (LEG, 0.0), (LEG, THICK), (corner, THICK), (THICK, corner), (THICK, LEG), (0.0, LEG)]
    points = [gmsh.model.geo.addPoint(*p, 0.0, size / 2.0 if i in (3, 4) else size) for i, p in enumerate(outline)]
    middle = gmsh.model.geo.addPoint(corner, corner, 0.0)
    curves = []
    for i, start in enumerate(points):
        end = points[(i + 1) % len(points)]
        curves.append(gmsh.model.geo.addCircleArc(start, middle, end) if i == 3 else gmsh.model.geo.addLine(start, end))
    return int(gmsh.model.geo.addPlaneSurface([gmsh.model.geo.addCurveLoop(curves)]))


def main() -> None:
    """Write the mesh."""
    arguments = gmsh_session.options("l_bracket", "L-bracket in 3D.", size=0.07)
    with gmsh_session.model("l_bracket"):
        surface = profile(arguments.size)
        # extrude returns the far copy, the volume, then one side for each curve
        far, volume, *sides = (entity for _, entity in gmsh.model.geo.extrude([(2, surface)], 0.0, 0.0, WIDTH))
        gmsh.model.geo.synchronize()
        bottom, load, upper, fillet, inner, clamped, back = sides
        gmsh_session.tag(3, "bracket", 1, [volume])
        parts = {"clamped": [clamped], "load": [load], "fillet": [fillet], "free": [bottom, upper, inner, back, surface, far]}
        for value, (name, faces) in enumerate(parts.items(), start=1):
            gmsh_session.tag(2, name, value, faces)
        gmsh_session.write(arguments.out, dim=3, order=arguments.order)


if __name__ == "__main__":
    main()
