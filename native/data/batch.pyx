# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Rows of a batch from a memory-mapped token stream: copy, widen, shift, and find document boundaries."""
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t

ctypedef fused token_t:
    uint8_t
    int8_t
    uint16_t
    int16_t
    int32_t
    int64_t


cdef Py_ssize_t first_after(const int64_t[::1] starts, int64_t offset) noexcept nogil:
    """Index of the first start above `offset` (binary search); the number of starts when there is none."""
    cdef Py_ssize_t low = 0, high = starts.shape[0], middle
    while low < high:
        middle = (low + high) // 2
        if starts[middle] <= offset:
            low = middle + 1
        else:
            high = middle
    return low


cdef int64_t copy_window(const token_t[::1] stream, int64_t start, int64_t vocabulary,
                         int32_t[::1] tokens, int32_t[::1] targets) noexcept nogil:
    """Fill a row of tokens and shifted targets; the offset of the first id outside the vocabulary, or -1."""
    cdef int64_t length = tokens.shape[0], end = stream.shape[0], t, offset
    cdef int64_t token
    for t in range(length + 1):
        offset = start + t
        if offset < end:
            token = <int64_t>stream[offset]
            if token < 0 or token >= vocabulary:
                return offset
        else:
            token = -1
        if t > 0:
            targets[t - 1] = <int32_t>token
        if t < length:
            tokens[t] = <int32_t>token if token >= 0 else 0
    return -1


cdef void mark_documents(const int64_t[::1] starts, Py_ssize_t documents, int64_t start, bint mask_boundary,
                         int32_t[::1] targets, int32_t[::1] positions,
                         int32_t[::1] document_starts) noexcept nogil:
    """Positions and document starts of a row, restarting where one of the first `documents` ones begins."""
    cdef int64_t length = positions.shape[0], t
    cdef Py_ssize_t following = first_after(starts, start)
    cdef int32_t current = 0
    for t in range(length):
        if following < documents and starts[following] == start + t:
            current = <int32_t>t
            # Empty documents share their start with the next one.
            while following < documents and starts[following] == start + t:
                following += 1
        positions[t] = <int32_t>t - current
        document_starts[t] = current
        if mask_boundary and following < documents and starts[following] == start + t + 1:
            targets[t] = -1


def fill_windows(const token_t[::1] stream, const int64_t[::1] starts, const int64_t[::1] windows,
                 const int64_t[::1] rows, int64_t vocabulary, bint boundaries, bint mask_boundary,
                 int32_t[:, ::1] tokens, int32_t[:, ::1] targets, int32_t[:, ::1] positions,
                 int32_t[:, ::1] document_starts):
    """Fill row rows[i] of the four outputs from the window of `stream` that begins at token windows[i].

    stream: ids [N]; starts: int64 [D], token offsets where documents begin, ascending (read only with
    `boundaries`); windows, rows: int64 [n]; outputs: int32 [B, T]. A target is the token after; past the
    stream's end tokens are 0 and targets -1. With `boundaries`, positions count from the first visible token
    of the row's document and document_starts hold its index in the window; with `mask_boundary` too, the
    target of a document's last token is -1. Without, positions are 0..T-1 and document_starts 0.

    Returns the stream offset of the first id outside [0, vocabulary), or -1. Raises ValueError on shapes.
    """
    cdef Py_ssize_t i, row
    # Empty documents at the end of the stream must not begin in the padding behind it.
    cdef Py_ssize_t documents = first_after(starts, stream.shape[0] - 1)
    cdef int64_t t, length = tokens.shape[1], bad = -1
    check_shapes(windows, rows, tokens, targets, positions, document_starts)
    with nogil:
        for i in range(windows.shape[0]):
            row = rows[i]
            bad = copy_window(stream, windows[i], vocabulary, tokens[row], targets[row])
            if bad >= 0:
                break
            if boundaries:
                mark_documents(starts, documents, windows[i], mask_boundary, targets[row], positions[row],
                               document_starts[row])
            else:
                for t in range(length):
                    positions[row, t] = <int32_t>t
                    document_starts[row, t] = 0
    return bad


cdef int check_shapes(const int64_t[::1] windows, const int64_t[::1] rows, int32_t[:, ::1] tokens,
                      int32_t[:, ::1] targets, int32_t[:, ::1] positions,
                      int32_t[:, ::1] document_starts) except -1:
    cdef Py_ssize_t i
    check_shape(tokens, targets, "targets")
    check_shape(tokens, positions, "positions")
    check_shape(tokens, document_starts, "document_starts")
    if windows.shape[0] != rows.shape[0]:
        raise ValueError(f"{windows.shape[0]} windows for {rows.shape[0]} rows")
    for i in range(windows.shape[0]):
        if windows[i] < 0 or rows[i] < 0 or rows[i] >= tokens.shape[0]:
            raise ValueError(f"window {windows[i]} for row {rows[i]} of {tokens.shape[0]} is out of range")
    return 0


cdef int check_shape(int32_t[:, ::1] tokens, int32_t[:, ::1] other, str name) except -1:
    if other.shape[0] != tokens.shape[0] or other.shape[1] != tokens.shape[1]:
        raise ValueError(f"{name} [{other.shape[0]}, {other.shape[1]}] must have the shape of tokens "
                         f"[{tokens.shape[0]}, {tokens.shape[1]}]")
    return 0
