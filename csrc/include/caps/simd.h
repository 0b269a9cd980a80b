// Vectors of the width of the instruction set: load, store, convert. Only for code compiled with CAPS_ISA.
#pragma once

#include <caps/kernel.h>

#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace caps::CAPS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// The type in which sums of a storage type are taken.
template <typename scalar_t>
using Acc = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <typename T, int n>
struct VectorType {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};

// Vec<float> fills a register; Vec<float, 8> has 8 lanes.
template <typename T, int n = kLanes<T>>
using Vec = typename VectorType<T, n>::type;

template <typename V>
using Element = std::remove_cvref_t<decltype(std::declval<V>()[0])>;

template <typename V>
constexpr int kLanesOf = int(sizeof(V) / sizeof(Element<V>));

template <typename V>
using IntsOf = Vec<std::conditional_t<sizeof(Element<V>) == 8, int64_t, int32_t>, kLanesOf<V>>;

template <typename V>
CAPS_INLINE V splat(Element<V> x) {
  return x - V{};  // x - 0 is x for every x, -0 and NaN too
}

// x, a vector that fills a register, in one: where registers are few, GCC reads what came from memory again for each
// use.
template <typename V>
CAPS_INLINE V in_register(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

template <typename To, typename From>
CAPS_INLINE To bit_cast(From from) {
  return __builtin_bit_cast(To, from);
}

// Whether any lane of a comparison's result is true.
template <typename M>
CAPS_INLINE bool any(M mask) {
  Element<M> found = 0;
  for (int i = 0; i < kLanesOf<M>; ++i) found |= mask[i];
  return found != 0;
}

template <typename V>
CAPS_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

template <typename V>
CAPS_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

template <typename V>
CAPS_INLINE V abs(V x) {
  using I = IntsOf<V>;
  constexpr auto sign = Element<I>(1) << (8 * sizeof(Element<I>) - 1);
  return bit_cast<V>(bit_cast<I>(x) & ~sign);
}

CAPS_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
CAPS_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
template <typename V>
CAPS_INLINE V sqrt(V x) {
  V root;
  for (int i = 0; i < kLanesOf<V>; ++i) root[i] = sqrt(x[i]);
  return root;
}

// ---- 16-bit conversions

template <int n>
CAPS_INLINE Vec<float, n> widen_float16(Vec<uint16_t, n> half) {
#if defined(__F16C__)
  if constexpr (n == 4) {
    return (Vec<float, n>)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&half)));
  } else if constexpr (n == 8) {
    return (Vec<float, n>)_mm256_cvtph_ps((__m128i)half);
  }
#if defined(__AVX512F__)
  else {
    return (Vec<float, n>)_mm512_cvtph_ps((__m256i)half);
  }
#endif
#else
  using I = Vec<uint32_t, n>;
  const I bits = __builtin_convertvector(half, I);
  const I magnitude = (bits & 0x7fff) << 13;
  // Exponents are biased by 15 in float16 and by 127 in float32; the product is right for subnormal numbers too.
  const auto scaled = bit_cast<I>(bit_cast<Vec<float, n>>(magnitude) * 0x1p112f);
  const I value = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : scaled;
  return bit_cast<Vec<float, n>>(value | (bits & 0x8000) << 16);
#endif
}

template <int n>
CAPS_INLINE Vec<uint16_t, n> narrow_float16(Vec<float, n> x) {
#if defined(__F16C__)
  if constexpr (n == 4) {
    Vec<uint16_t, n> half;
    _mm_storel_epi64(reinterpret_cast<__m128i*>(&half), _mm_cvtps_ph((__m128)x, 0));
    return half;
  } else if constexpr (n == 8) {
    return (Vec<uint16_t, n>)_mm256_cvtps_ph((__m256)x, 0);
  }
#if defined(__AVX512F__)
  else {
    return (Vec<uint16_t, n>)_mm512_cvtps_ph((__m512)x, 0);
  }
#endif
#else
  using I = Vec<uint32_t, n>;
  const I bits = bit_cast<I>(x);
  const I magnitude = bits & 0x7fffffff;
  const I normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  // Adding 0.5 moves the bits of a subnormal result to the end of the significand, rounded.
  const I subnormal = bit_cast<I>(bit_cast<Vec<float, n>>(magnitude) + 0.5f) - 0x3f000000u;
  I value = magnitude < (113u << 23) ? subnormal : normal;
  value = magnitude >= 0x477ff000u ? I{} + 0x7c00u : value;
  value = magnitude > 0x7f800000u ? I{} + 0x7e00u : value;
  return __builtin_convertvector(value | (bits >> 16 & 0x8000), Vec<uint16_t, n>);
#endif
}

template <int n>
CAPS_INLINE Vec<float, n> widen_bfloat16(Vec<uint16_t, n> brain) {
  return bit_cast<Vec<float, n>>(__builtin_convertvector(brain, Vec<uint32_t, n>) << 16);
}

template <int n>
CAPS_INLINE Vec<uint16_t, n> narrow_bfloat16(Vec<float, n> x) {
  using I = Vec<uint32_t, n>;
  const I bits = bit_cast<I>(x);
  const I rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const I value = (bits & 0x7fffffff) > 0x7f800000u ? I{} + 0x7fc0u : rounded;
  return __builtin_convertvector(value, Vec<uint16_t, n>);
}

// ---- Memory. V is a vector of Acc<scalar_t>; addresses are aligned to numbers.

// A vector where it lies. Copied by memcpy, GCC takes it for integers and keeps every vector that is stored twice.
template <typename V>
struct InMemory {
  typedef V type __attribute__((aligned(alignof(Element<V>)), may_alias));
};

template <typename V, typename scalar_t>
CAPS_INLINE V load(const scalar_t* from) {
  return *reinterpret_cast<const typename InMemory<V>::type*>(from);
}
template <typename V>
CAPS_INLINE V load(const BFloat16* from) {
  Vec<uint16_t, kLanesOf<V>> memory;
  __builtin_memcpy(&memory, from, sizeof(memory));
  return widen_bfloat16<kLanesOf<V>>(memory);
}
template <typename V>
CAPS_INLINE V load(const Float16* from) {
  Vec<uint16_t, kLanesOf<V>> memory;
  __builtin_memcpy(&memory, from, sizeof(memory));
  return widen_float16<kLanesOf<V>>(memory);
}

template <typename V, typename scalar_t>
CAPS_INLINE void store(scalar_t* to, V value) {
  *reinterpret_cast<typename InMemory<V>::type*>(to) = value;
}
template <typename V>
CAPS_INLINE void store(BFloat16* to, V value) {
  const auto memory = narrow_bfloat16<kLanesOf<V>>(value);
  __builtin_memcpy(to, &memory, sizeof(memory));
}
template <typename V>
CAPS_INLINE void store(Float16* to, V value) {
  const auto memory = narrow_float16<kLanesOf<V>>(value);
  __builtin_memcpy(to, &memory, sizeof(memory));
}

// Stores a whole cache line without reading it first and without keeping it in the cache: for results far larger than
// that. `to` must be aligned to 64 bytes, and finish_streaming be called before another thread may read them.
template <typename V>
constexpr bool kCanStream = sizeof(V) == 64;

template <typename V>
CAPS_INLINE void stream(Element<V>* to, V value) {
  static_assert(kCanStream<V>);
#if defined(__AVX512F__)
  if constexpr (sizeof(value[0]) == 4) _mm512_stream_ps(to, (__m512)value);
  else _mm512_stream_pd(to, (__m512d)value);
#else
  store(to, value);
#endif
}

// With vectors of half a line, lines must be written half after half: `size` numbers, whole lines, from a near copy.
// What is made in order gains nothing from it.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kCanStreamCopies = true;
CAPS_INLINE void stream_copy(const float* from, int64_t size, float* to) {
  for (int64_t n = 0; n < size; n += 8) _mm256_stream_ps(to + n, _mm256_loadu_ps(from + n));
}
CAPS_INLINE void stream_copy(const double* from, int64_t size, double* to) {
  for (int64_t n = 0; n < size; n += 4) _mm256_stream_pd(to + n, _mm256_loadu_pd(from + n));
}
#else
constexpr bool kCanStreamCopies = false;
#endif

CAPS_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Lanes 0 … count - 1 from memory `stride` elements apart; the others are 0.
template <typename V, typename scalar_t>
CAPS_INLINE V load_strided(const scalar_t* from, int64_t stride, int64_t count) {
  scalar_t memory[kLanesOf<V>] = {};
  for (int64_t i = 0; i < count; ++i) memory[i] = from[i * stride];
  return load<V>(memory);
}

// Lanes 0 … count - 1 to memory `stride` elements apart.
template <typename V, typename scalar_t>
CAPS_INLINE void store_strided(scalar_t* to, int64_t stride, V value, int64_t count) {
  scalar_t memory[kLanesOf<V>];
  store(memory, value);
  for (int64_t i = 0; i < count; ++i) to[i * stride] = memory[i];
}

// Whether load_some and store_some are about as fast as load and store.
#if defined(__AVX512F__)
template <typename scalar_t>
constexpr bool kPartsLoad = true;
#elif defined(__AVX2__)
template <typename scalar_t>
constexpr bool kPartsLoad = sizeof(scalar_t) > 2;
#else
template <typename scalar_t>
constexpr bool kPartsLoad = false;
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// All bits of lanes 0 … count - 1.
template <typename V>
CAPS_INLINE IntsOf<V> first_lanes(int64_t count) {
  IntsOf<V> index;
  for (int i = 0; i < kLanesOf<V>; ++i) index[i] = i;
  return index < splat<IntsOf<V>>(Element<IntsOf<V>>(count));
}
#endif

// Lanes 0 … count - 1 from consecutive memory, nothing beyond it touched; the others are 0.
template <typename V, typename scalar_t>
CAPS_INLINE V load_some(const scalar_t* from, int64_t count) {
#if defined(__AVX512F__)
  const auto mask = (1u << count) - 1;
  if constexpr (sizeof(scalar_t) == 2) {
    Vec<uint16_t, kLanesOf<V>> memory;
    if constexpr (sizeof(V) == 64) memory = (decltype(memory))_mm256_maskz_loadu_epi16(__mmask16(mask), from);
    else if constexpr (sizeof(V) == 32) memory = (decltype(memory))_mm_maskz_loadu_epi16(__mmask8(mask), from);
    else return load_strided<V>(from, 1, count);
    if constexpr (std::is_same_v<scalar_t, BFloat16>) return widen_bfloat16<kLanesOf<V>>(memory);
    else return widen_float16<kLanesOf<V>>(memory);
  } else if constexpr (sizeof(scalar_t) == 4) {
    if constexpr (sizeof(V) == 64) return (V)_mm512_maskz_loadu_ps(__mmask16(mask), from);
    else if constexpr (sizeof(V) == 32) return (V)_mm256_maskz_loadu_ps(__mmask8(mask), from);
    else return (V)_mm_maskz_loadu_ps(__mmask8(mask), from);
  } else {
    if constexpr (sizeof(V) == 64) return (V)_mm512_maskz_loadu_pd(__mmask8(mask), from);
    else if constexpr (sizeof(V) == 32) return (V)_mm256_maskz_loadu_pd(__mmask8(mask), from);
    else return (V)_mm_maskz_loadu_pd(__mmask8(mask), from);
  }
#else
  if (count == kLanesOf<V>) return load<V>(from);
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32 && sizeof(scalar_t) == 4) {
    return (V)_mm256_maskload_ps(from, (__m256i)first_lanes<V>(count));
  } else if constexpr (sizeof(V) == 32 && sizeof(scalar_t) == 8) {
    return (V)_mm256_maskload_pd(from, (__m256i)first_lanes<V>(count));
  } else if constexpr (sizeof(scalar_t) == 4) {
    return (V)_mm_maskload_ps(from, (__m128i)first_lanes<V>(count));
  } else if constexpr (sizeof(scalar_t) == 8) {
    return (V)_mm_maskload_pd(from, (__m128i)first_lanes<V>(count));
  }
#endif
#endif
  return load_strided<V>(from, 1, count);
}

// Lanes 0 … count - 1 to consecutive memory, nothing beyond it touched.
template <typename V, typename scalar_t>
CAPS_INLINE void store_some(scalar_t* to, V value, int64_t count) {
#if defined(__AVX512F__)
  const auto mask = (1u << count) - 1;
  if constexpr (sizeof(scalar_t) == 2) {
    Vec<uint16_t, kLanesOf<V>> memory;
    if constexpr (std::is_same_v<scalar_t, BFloat16>) memory = narrow_bfloat16<kLanesOf<V>>(value);
    else memory = narrow_float16<kLanesOf<V>>(value);
    if constexpr (sizeof(V) == 64) return _mm256_mask_storeu_epi16(to, __mmask16(mask), (__m256i)memory);
    else if constexpr (sizeof(V) == 32) return _mm_mask_storeu_epi16(to, __mmask8(mask), (__m128i)memory);
  } else if constexpr (sizeof(scalar_t) == 4) {
    if constexpr (sizeof(V) == 64) return _mm512_mask_storeu_ps(to, __mmask16(mask), (__m512)value);
    else if constexpr (sizeof(V) == 32) return _mm256_mask_storeu_ps(to, __mmask8(mask), (__m256)value);
    else return _mm_mask_storeu_ps(to, __mmask8(mask), (__m128)value);
  } else {
    if constexpr (sizeof(V) == 64) return _mm512_mask_storeu_pd(to, __mmask8(mask), (__m512d)value);
    else if constexpr (sizeof(V) == 32) return _mm256_mask_storeu_pd(to, __mmask8(mask), (__m256d)value);
    else return _mm_mask_storeu_pd(to, __mmask8(mask), (__m128d)value);
  }
#else
  // Stores with a mask are slow on AMD's processors.
  if (count == kLanesOf<V>) return store(to, value);
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32 && sizeof(scalar_t) == 4) {
    return _mm256_maskstore_ps(to, (__m256i)first_lanes<V>(count), (__m256)value);
  } else if constexpr (sizeof(V) == 32 && sizeof(scalar_t) == 8) {
    return _mm256_maskstore_pd(to, (__m256i)first_lanes<V>(count), (__m256d)value);
  } else if constexpr (sizeof(scalar_t) == 4) {
    return _mm_maskstore_ps(to, (__m128i)first_lanes<V>(count), (__m128)value);
  } else if constexpr (sizeof(scalar_t) == 8) {
    return _mm_maskstore_pd(to, (__m128i)first_lanes<V>(count), (__m128d)value);
  }
#endif
#endif
  store_strided(to, 1, value, count);
}

// One number in the type in which sums are taken.
template <typename scalar_t>
CAPS_INLINE Acc<scalar_t> load_one(const scalar_t* from) {
  if constexpr (sizeof(scalar_t) == 2) return load_strided<Vec<float, 4>>(from, 1, 1)[0];
  else return *from;
}
template <typename scalar_t>
CAPS_INLINE void store_one(scalar_t* to, Acc<scalar_t> value) {
  if constexpr (sizeof(scalar_t) == 2) store_strided(to, 1, Vec<float, 4>{value}, 1);
  else *to = value;
}

// Runs f<scalar_t>() for the storage type of a dtype.
template <typename F>
CAPS_INLINE void dispatch_floating(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32: return f.template operator()<float>();
    case DType::float64: return f.template operator()<double>();
    case DType::bfloat16: return f.template operator()<BFloat16>();
    case DType::float16: return f.template operator()<Float16>();
  }
}

}  // namespace caps::CAPS_ISA
