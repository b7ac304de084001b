"""Vision tokenizers: from features of patches to a few vision tokens per medium.

Each is a module that is built as `Tokenizer(options, dim_in, num_patches, dim_out)`, where `dim_out` is None if the
fusion takes any width. If its constructor has the argument `grid`, it also gets the rows and columns of patches of one
frame, class token apart, or None where they are unknown. It has

- `dim_out`: channels of its tokens;
- `num_tokens(num_frames)`: vision tokens of one medium;
- `forward(features, frame_mask=None)`: float[B, T_img, F, v, dim_in], bool[B, T_img, F] -> float[B, T_img, n, dim_out];
- `token_mask(frame_mask)`: bool[B, T_img, F] -> bool[B, T_img, n], true for tokens that are not padding;
- `token_grid`: rows and columns of one frame's tokens, None if they are no grid; may be left out;
- `encodes_media_independently`: whether a medium's tokens depend on nothing else in its row; may be left out if false.

The values in padding never change a token that is not padding.
"""
