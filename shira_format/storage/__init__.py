"""Where bytes are: local files, object stores and the Hugging Face hub; safetensors files; atomic writes."""
