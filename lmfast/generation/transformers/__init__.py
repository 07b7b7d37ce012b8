"""Running models of Hugging Face transformers; `runner` and `static` import it."""
