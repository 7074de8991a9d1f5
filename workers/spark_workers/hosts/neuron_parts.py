"""What a replica needs of a Neuron package, as one file: its machine code, that of the bridge, names and assets.

A compile worker reads the package and writes the file, see `neuron_prepare`; replicas read the file and never see the
package. The code of the package stands first, so that it can be mapped and its pages are shared; the rest stands
behind it, see `code_file`.
"""

import msgpack

from spark_workers.packages.glue import Glue

KIND = "neuron"

#: The parts: machine code of the two modules of the bridge, the names that the glue gives, and the preload archive.
STUBS, DRIVER, GLUE, DATA = "stubs", "driver", "glue", "data"

#: What a package exports, by the names in C.
CALCULATE, CONSTRUCT, ALLOCATE, RELEASE = "node_calc_v3", "construct", "malloc", "free"

#: The import for calls of other services; its first argument says to what.
DISPATCH, DISPATCH_TYPE, SPARK_SERVICE = "asyncjs__dispatch", "(i32, i32, i32) -> i32", 0


def write_glue_part(glue: Glue) -> bytes:
    """Return the part `GLUE`."""
    packed: bytes = msgpack.packb(glue.as_data())
    return packed


def read_glue_part(packed: bytes) -> Glue:
    """Return the names again."""
    return Glue.from_data(msgpack.unpackb(packed))
