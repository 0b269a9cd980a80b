// What goes across the lanes of vectors: reductions, sums of many vectors at once, transpositions. Only for code
// compiled with CAPS_ISA.
#pragma once

#include <caps/simd.h>

namespace caps::CAPS_ISA {

// ---- Reductions, in a fixed order

template <int begin, typename V, int... lane>
CAPS_INLINE auto lanes_from(V v, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(v, v, (begin + lane)...);
}

template <typename V, typename F>
CAPS_INLINE Element<V> reduce(V v, const F& combine) {
  constexpr int half = kLanesOf<V> / 2;
  if constexpr (half == 1) {
    return combine(v[0], v[1]);
  } else {
    const auto low = lanes_from<0>(v, std::make_integer_sequence<int, half>());
    const auto high = lanes_from<half>(v, std::make_integer_sequence<int, half>());
    return reduce(combine(low, high), combine);
  }
}

template <typename V>
CAPS_INLINE Element<V> reduce_add(V v) {
  return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

template <typename V>
CAPS_INLINE Element<V> reduce_max(V v) {
  return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// ---- Many horizontal sums at once

// Of each `span` lanes every other `unit` of a and then of b, from the first on in a, from the second on in b.
template <int unit, int span, typename V, int... e>
CAPS_INLINE void separate(V& a, V& b, std::integer_sequence<int, e...>) {
  constexpr int n = sizeof...(e), half = span / 2;
  const V even =
      __builtin_shufflevector(a, b, (e % span / half * n + e / span * span + e % half / unit * 2 * unit + e % unit)...);
  b = __builtin_shufflevector(
      a, b, (e % span / half * n + e / span * span + e % half / unit * 2 * unit + e % unit + unit)...);
  a = even;
}

// Lane e is a[e] + a[e ^ h] where bit h of e is clear, and the same of b where it is set.
template <int h, typename V, int... e>
CAPS_INLINE V fold(V a, V b, std::integer_sequence<int, e...>) {
  constexpr int n = sizeof...(e);
  const V kept = __builtin_shufflevector(a, b, (e & h ? n + e : e)...);
  const V moved = __builtin_shufflevector(a, b, (e & h ? n + (e ^ h) : e ^ h)...);
  return kept + moved;
}

// Lane k is the sum of the lanes of row(k), for k = 0 … n - 1: n - 1 additions for n sums. Of fewer rows than lanes it
// is the sum over n lanes, and the next n those over the next. Neighbouring numbers are added, then neighbouring 16
// bytes, so that each step is two moves of one instruction on x86-64 and an addition.
template <typename V, int n = kLanesOf<V>, int of = n, typename Row>
CAPS_INLINE V sums_of_rows(const Row& row, int64_t first = 0) {
  constexpr int m = 16 / sizeof(Element<V>);
  constexpr auto lanes = std::make_integer_sequence<int, kLanesOf<V>>();
  static_assert(of >= m);
  if constexpr (n == 1) {
    return row(first);
  } else {
    V a = sums_of_rows<V, n / 2, of>(row, first), b = sums_of_rows<V, n / 2, of>(row, first + n / 2);
    if constexpr (n <= m) separate<1, m>(a, b, lanes);
    else if constexpr (of == kLanesOf<V>) separate<m, kLanesOf<V>>(a, b, lanes);
    else return fold<n / 2>(a, b, lanes);
    return a + b;
  }
}

// ---- Transposition

// Exchanges the lanes of a with bit h set for those of b with it clear.
template <int h, typename V, int... e>
CAPS_INLINE void exchange(V& a, V& b, std::integer_sequence<int, e...>) {
  constexpr int n = sizeof...(e);
  const V low = __builtin_shufflevector(a, b, (e & h ? n + (e ^ h) : e)...);
  b = __builtin_shufflevector(a, b, (e & h ? n + e : e ^ h)...);
  a = low;
}

// Lanes of a and b by turns, the first halves of each 16 bytes in a, the second halves in b.
template <typename V, int... e>
CAPS_INLINE void interleave(V& a, V& b, std::integer_sequence<int, e...>) {
  constexpr int n = sizeof...(e), m = 16 / sizeof(Element<V>);
  const V low = __builtin_shufflevector(a, b, (e % 2 * n + e / m * m + e % m / 2)...);
  b = __builtin_shufflevector(a, b, (e % 2 * n + e / m * m + e % m / 2 + m / 2)...);
  a = low;
}

// Lane k of rows[i] becomes lane i of rows[k], for as many rows as a vector has lanes. Each step exchanges a bit of the
// lane's index for one of the row's by what is one instruction without constants on x86-64. `interleave` moves a new
// bit in from below, so its rows come from the highest bit down; `separate` from above.
template <typename V>
CAPS_INLINE void transpose(V* rows) {
  constexpr int n = kLanesOf<V>, m = 16 / sizeof(Element<V>);
  constexpr auto lanes = std::make_integer_sequence<int, n>();
  CAPS_UNROLL
  for (int h = m / 2; h > 0; h /= 2) {
    CAPS_UNROLL
    for (int i = 0; i < n; ++i) {
      if (!(i & h)) interleave(rows[i], rows[i | h], lanes);
    }
  }
  if constexpr (n > m) {
    CAPS_UNROLL
    for (int h = m; h < n; h *= 2) {
      CAPS_UNROLL
      for (int i = 0; i < n; ++i) {
        if (!(i & h)) separate<m, n>(rows[i], rows[i | h], lanes);
      }
    }
  }
}

}  // namespace caps::CAPS_ISA
