"""The bundled tiny models: their classifier, their tokenizers and how they are trained."""
