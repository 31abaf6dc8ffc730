"""bucket: every image decoded, turned upright, resized and cropped to an aspect bucket; pixels stay lossless."""
