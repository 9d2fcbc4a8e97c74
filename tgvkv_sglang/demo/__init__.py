"""The bundled demo model's scenes and questions (numpy, PIL and the standard library only), and small checkpoints."""
