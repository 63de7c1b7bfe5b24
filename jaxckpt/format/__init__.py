"""Bytes to records and back: zarr3 metadata, Orbax metadata files, the OCDBT database."""
