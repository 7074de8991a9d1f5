"""Model packages: what a zip holds, and what its JavaScript glue says about the module. Nothing of it is ever run."""
