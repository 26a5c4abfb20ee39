"""What encoded images say beside their pixels, read from the bytes themselves, and the files without it.

Decoders refuse pictures for faults of metadata that no viewer minds. So size, orientation and colour profile are read
here, by rules that never cost a picture, and Pillow gets files that have nothing but pixels where that can be.

file_bytes          a file's bytes, fetched where they are asked for
exif                the orientation in EXIF
jpeg                segments of JPEG: size, orientation, profile; where its data end
jpeg_data           whether a JPEG's data fill its picture
png                 chunks of PNG: the same
webp                chunks of WebP: the same
avif                boxes of AVIF: the same
colour_profile      what a colour profile does to an image
"""
