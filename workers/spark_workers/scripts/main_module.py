"""What multiprocessing's children run in place of the script's ``__main__``.

Python's spawn and forkserver children import the parent's main module again to find the script's classes. In a worker
that main module is this one: in such a child it installs the loader, so that the script is imported there as it was
in the worker.
"""

import os
import sys

from spark_workers.scripts import loader, tree

if __name__ == "__mp_main__" and tree.ENVIRONMENT in os.environ:
    _tree, (_script, _name) = tree.read_published(os.environ[tree.ENVIRONMENT])
    sys.meta_path.insert(0, tree.OwnFinder(_tree, {os.path.realpath(_script): loader.compile_script}))
