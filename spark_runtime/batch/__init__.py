"""Rows in, rows out, through a model: what ``spark batch`` does. Read `spark_runtime.batch.batch` first."""
