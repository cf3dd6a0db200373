"""Everything around the models that is not their mathematics: data, files, metrics, optimisation."""
