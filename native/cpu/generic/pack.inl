// Packing of panels, written once over simd.h and the transpose(V[kLanes]) of microkernel.h. Included inside the
// instruction set's unnamed namespace. Storage is Fp32, Bf16 or Fp16 of simd.h.
//
// Bytes: each source element is read once and written once as fp32. Neither the loads nor the shuffles (kLanes * 2 to 4
// per kLanes * kLanes elements) should show: a packed element meets at least kLanes multiply-adds.

// Rows of a source lie too far apart for the hardware to see that the next panels read on in each; and a block that is
// read along ends before it has seen much. So each row is asked for this far ahead.
constexpr std::int64_t kAheadBytes = 256;
template <class Element>
inline void ask_ahead(const Element* p) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kAheadBytes);
}

// Stores x at row p of a panel, lane 0 at `first`. A panel narrower than a vector takes the whole vector where the next
// row, still to be written, can hold what is too much: masked stores are slow on some cores.
inline void store_panel(float* panel, std::int64_t p, std::int64_t k, std::int64_t panel_width, std::int64_t first,
                        V x) {
    float* out = panel + p * panel_width + first;
    const std::int64_t room = panel_width - first;
    if (room >= kLanes || (first == 0 && (k - p) * panel_width >= kLanes))
        store(out, x);
    else
        store_n(out, x, room);
}

// Columns [first, first + kLanes) of a panel, as far as it and the source reach.
template <class Storage>
void pack_across_lanes(float* panel, const typename Storage::Element* source, std::int64_t ld, std::int64_t k,
                       std::int64_t width, std::int64_t panel_width, std::int64_t first) {
    const std::int64_t valid = width - first;
    if (valid >= kLanes)
        for (std::int64_t p = 0; p < k; ++p) {
            ask_ahead(source + p * ld + first);
            store_panel(panel, p, k, panel_width, first, Storage::load(source + p * ld + first));
        }
    else if (valid > 0)
        for (std::int64_t p = 0; p < k; ++p) {
            ask_ahead(source + p * ld + first);
            store_panel(panel, p, k, panel_width, first, Storage::load_n(source + p * ld + first, valid));
        }
    else
        for (std::int64_t p = 0; p < k; ++p) store_panel(panel, p, k, panel_width, first, set(0.0f));
}

template <class Storage>
void pack_across(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                 std::int64_t panel_width) {
    const auto* elements = static_cast<const typename Storage::Element*>(source);
    if (width == panel_width &&
        panel_width == 2 * kLanes) {  // the usual right operand: each row of the source is visited once
        for (std::int64_t p = 0; p < k; ++p) {
            ask_ahead(elements + p * ld);
            store(panel + p * panel_width, Storage::load(elements + p * ld));
            store(panel + p * panel_width + kLanes, Storage::load(elements + p * ld + kLanes));
        }
        return;
    }
    for (std::int64_t first = 0; first < panel_width; first += kLanes)
        pack_across_lanes<Storage>(panel, elements, ld, k, width, panel_width, first);
}

template <class Storage>
void pack_along(float* panel, const void* source, std::int64_t ld, std::int64_t k, std::int64_t width,
                std::int64_t panel_width) {
    const auto* elements = static_cast<const typename Storage::Element*>(source);
    for (std::int64_t first = 0; first < panel_width; first += kLanes) {
        const auto* vectors = elements + first * ld;
        const std::int64_t valid = width - first;
        std::int64_t p = 0;
        for (; p + kLanes <= k; p += kLanes) {
            V block[kLanes];
            PYTRAIN_UNROLL
            for (std::int64_t i = 0; i < kLanes; ++i) {
                if (i < valid) ask_ahead(vectors + i * ld + p);
                block[i] = i < valid ? Storage::load(vectors + i * ld + p) : set(0.0f);
            }
            transpose(block);
            PYTRAIN_UNROLL
            for (std::int64_t i = 0; i < kLanes; ++i) store_panel(panel, p + i, k, panel_width, first, block[i]);
        }
        if (p < k) {
            V block[kLanes];
            PYTRAIN_UNROLL
            for (std::int64_t i = 0; i < kLanes; ++i)
                block[i] = i < valid ? Storage::load_n(vectors + i * ld + p, k - p) : set(0.0f);
            transpose(block);
            PYTRAIN_UNROLL
            for (std::int64_t i = 0; i < kLanes; ++i)
                if (p + i < k) store_panel(panel, p + i, k, panel_width, first, block[i]);
        }
    }
}
