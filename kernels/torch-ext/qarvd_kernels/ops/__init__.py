"""Declare every operator: schema, argument checks, shape function. Importing a module here registers its operators."""
