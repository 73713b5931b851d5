"""Schemas, argument checks and shape functions of every operator; importing a module here registers its operators."""
