"""One sample as it is trained.

reader              bytes of images, extra images and captions of an index, read where they are
decode              an encoded image to the pixels of its bucket, with SDXL's size conditions
extra_images        an extra image (a condition, a mask) to the pixels that lie over those of its image
scaling             scaling with antialiasing and cutting a rectangle out
augmentation        where an image is cropped, whether it is mirrored, how its colours change
captions            what becomes of a caption between its file and the tokenizer
prepare             all of it together: bytes and text become pixels of a bucket and a caption
"""
