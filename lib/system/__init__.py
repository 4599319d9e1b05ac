"""What has no mathematics in it: files, the cache, hashes of code, devices, meters, one-line errors."""
