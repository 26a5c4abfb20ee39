"""Latents and text states that are computed once and kept.

settings            what entries were made with: part of their place and of each read
entries             an entry for each row of the index, found again by the row alone
block_files         caches on disk with a safetensors file for each block of rows
npz_files           caches beside images: .npz that sd-scripts reads and writes
locations           where caches on disk lie
fill                computing what a cache lacks, each process its own blocks
encodings           what entries are made of: images through the VAE, captions through the text encoders
"""
