"""``python -m spark_cli``: the same as the command ``spark``."""

from spark_cli.main import main

main()
