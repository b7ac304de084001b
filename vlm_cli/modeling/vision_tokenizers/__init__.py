"""Vision tokenizers: features of patches to a few tokens per medium.

Each is a module built as `Tokenizer(options, dim_in, num_patches, dim_out)`, where `dim_out` is None if
the fusion takes any width, with

- `dim_out`: channels of its tokens;
- `num_tokens(num_frames)`: vision tokens of one medium;
- `forward(features, frame_mask=None)`: float[B, T_img, F, v, dim_in], bool[B, T_img, F] -> float[B, T_img, n, dim_out];
- `token_mask(frame_mask)`: bool[B, T_img, F] -> bool[B, T_img, n], true where a token stands for something.

What padding holds never changes a token that is not padding.
"""
