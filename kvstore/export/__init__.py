"""Rows to other formats, one module a target. Each writes a stream of batches, in bounded memory."""
