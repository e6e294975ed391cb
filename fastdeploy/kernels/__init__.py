"""The operations of a decoder, one file each, as Triton kernels. Start with norm.py; linear.py and attention.py are the
two that decide the speed. Nothing here imports Paddle or anything above this folder.
"""
