"""The bundled demo model's training: model, data, stages, export, evaluation (its model card has the commands)."""
