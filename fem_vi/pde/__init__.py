"""PDEs on meshes, in DOLFINx and PETSc."""
