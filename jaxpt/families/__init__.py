"""Model families: one file each, found by config.json's model_type.

A family's file holds one `FAMILY` (family.Family): the keys of its config.json that are fields of
ModelSpec, the values that it fixes, and the names of tensors that differ from Llama's. To add a
family, add a file.
"""
