"""Names of the axes of a mesh of devices, and how many parts the mesh in force has along one.

    data        rows of a batch
    features    features of a dictionary (and heads and neurons of a language model)
    ensemble    members of a sweep

A mesh is in force inside `with jax.set_mesh(mesh)`; a compiled step that was made for a mesh puts it in force itself.
"""

import jax

DATA, FEATURES, ENSEMBLE = "data", "features", "ensemble"
AXES = (DATA, FEATURES, ENSEMBLE)


def parts(axis: str) -> int:
    """Over how many devices the mesh in force divides `axis`; 1 where none is, or it has no such axis.

    A static number, while tracing too.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(axis, 1)


def divided() -> bool:
    """Whether the mesh in force divides rows or features. A static answer, while tracing too."""
    return parts(DATA) * parts(FEATURES) > 1
