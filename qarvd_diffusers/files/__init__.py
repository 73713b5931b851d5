"""Files on disk: atomic writes, the cache folder, safetensors files."""
