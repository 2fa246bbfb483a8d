"""From a prompt to an image, with the network, the samplers and the autoencoder of this project alone.

Text encoders, tokenizers and image files are transformers' and Pillow's (the extra `sample`).
"""
