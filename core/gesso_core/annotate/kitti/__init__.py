"""KITTI's 3D object benchmark: calibration, label lines, boxes, its evaluation and its folders.

Frames: *velodyne* has x forward, y left, z up; *rect* (the rectified camera 0) has x right, y down,
z forward. Labels and everything fitted live in *rect*; pixels belong to camera 2.
"""
