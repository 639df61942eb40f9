"""Rows to other formats, one module a target: batches in, a file out, in bounded memory."""
