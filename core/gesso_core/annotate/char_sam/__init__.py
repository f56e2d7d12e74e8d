"""Char-SAM (arXiv 2412.19917): masks of single characters from word boxes, nothing trained.

``pipeline.CharSam`` runs the parts in the order of the paper:

    rectify → ink → cuts → refine_boxes      word polygon → one box per character (CBR)
    glyphs → register → refine_glyphs        character → glyph → points → mask (CGR)
    colour → merge                           stroke colour, shared pixels, scores

``readers`` and ``writers`` speak the formats of the data sets, ``ocr`` finds words where none are
given, ``evaluate`` measures all of it.
"""
