"""FG-CLIP: image, long text and regions."""
