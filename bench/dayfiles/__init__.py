"""Day files: rows a second, against a bare Polars read of the same columns and naive pandas."""
