"""Which images there are, and where.

sources             what there is to index: shards and folders, found by names and file states alone
folder_walk         the folders of a data set with their files, and what lies there and is not used
class_folders       folders named N_class words, and such as are nearly named so
table               the index: rows of all sources, memory-mapped
extras              extra images of a sample by name, and where a source has them
rows                one row an image, as scanning a source makes them
shards              rows of one LAION shard: tar and parquet
shard_members       which members of a tar make a sample, and what is wrong with such a group
sidecar             what the parquet and the stats beside a shard say of its samples
folders             rows of a folder of images with caption files
metadata            what a metadata JSON (--in_json) says of images
tar_headers         where a tar's members are, by one pass over its headers
kept_tables         tables that are made once and kept on disk while their sources are unchanged
folder_use          folders that users and runs share: who may write there, and who uses one
mapped_file         arrays and notes in one file that processes map into memory
worker_pool         work spread over processes
hub                 data sets by hub name
"""
