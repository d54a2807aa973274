// What arithmetic instructions compute, by mnemonic. Registers hold values in their low bits, zeros above.

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <unordered_map>

#include "program.h"

namespace ptx {
namespace {

struct Brain {  // bf16
    uint16_t bits;

    Brain() = default;
    explicit Brain(double x) {
        const auto wide = std::bit_cast<uint32_t>(float(x));
        bits = std::isnan(x) ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
    explicit operator double() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};
using Half = _Float16;

template <class T>
T get(const Instruction& i, int operand, const uint64_t* r) {
    const uint64_t bits = i.in[operand].of(r);
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}
template <class T>
void put(const Instruction& i, uint64_t* r, T value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    r[i.out[0]] = bits;
}

template <class T, auto F>
void unary(const Instruction& i, uint64_t* r) {
    put(i, r, T(F(get<T>(i, 0, r))));
}
template <class T, auto F>
void binary(const Instruction& i, uint64_t* r) {
    put(i, r, T(F(get<T>(i, 0, r), get<T>(i, 1, r))));
}
template <class T, auto F>
void ternary(const Instruction& i, uint64_t* r) {
    put(i, r, T(F(get<T>(i, 0, r), get<T>(i, 1, r), get<T>(i, 2, r))));
}
template <class T, auto F>
void compare(const Instruction& i, uint64_t* r) {
    r[i.out[0]] = F(get<T>(i, 0, r), get<T>(i, 1, r));
}
template <class T, class Wide>
void multiply_wide(const Instruction& i, uint64_t* r) {
    put(i, r, Wide(Wide(get<T>(i, 0, r)) * Wide(get<T>(i, 1, r))));
}
template <class T, class Wide>
void multiply_add_wide(const Instruction& i, uint64_t* r) {
    put(i, r, Wide(Wide(get<T>(i, 0, r)) * Wide(get<T>(i, 1, r)) + get<Wide>(i, 2, r)));
}
template <class T>
void shift_left(const Instruction& i, uint64_t* r) {
    const auto by = get<uint32_t>(i, 1, r);
    put(i, r, T(by >= 8 * sizeof(T) ? 0 : uint64_t(get<T>(i, 0, r)) << by));
}
template <class T>
void shift_right(const Instruction& i, uint64_t* r) {
    const auto by = get<uint32_t>(i, 1, r), most = uint32_t(8 * sizeof(T) - 1);
    const T x = get<T>(i, 0, r);
    put(i, r, by <= most ? T(x >> by) : T(x < T(0) ? -1 : 0));
}
template <class T>
void select(const Instruction& i, uint64_t* r) {
    put(i, r, get<uint8_t>(i, 2, r) ? get<T>(i, 0, r) : get<T>(i, 1, r));
}

template <class T>
constexpr bool is_float = !std::is_integral_v<T>;

// Floats go through double, which holds all of them. To an integer the value is cut, then bound to what the type holds.
template <class To, class From, bool whole>
void convert(const Instruction& i, uint64_t* r) {
    const From x = get<From>(i, 0, r);
    if constexpr (!is_float<From>) {
        put(i, r, To(x));
    } else {
        const double value = whole ? std::trunc(double(x)) : double(x);
        if constexpr (is_float<To>) {
            put(i, r, To(value));
        } else {
            using Limits = std::numeric_limits<To>;
            const bool above = value >= double(Limits::max()), below = !(value > double(Limits::min()));
            put(i, r, std::isnan(value) ? To(0) : above ? Limits::max() : below ? Limits::min() : To(value));
        }
    }
}

using Table = std::unordered_map<std::string, Work>;

template <class To, class From>
void add_conversion(Table& table, const std::string& to, const std::string& from) {
    const std::string types = to + "." + from;
    constexpr bool exact = is_float<To> == is_float<From> && (!is_float<To> || sizeof(To) > sizeof(From));
    if constexpr (is_float<From> && (!is_float<To> || std::is_same_v<To, From>))
        table["cvt.rzi." + types] = convert<To, From, true>;
    else
        table[(exact ? "cvt." : "cvt.rn.") + types] = convert<To, From, false>;
}

template <class To>
void add_conversions(Table& table, const std::string& to) {
    add_conversion<To, uint8_t>(table, to, "u8");
    add_conversion<To, int8_t>(table, to, "s8");
    add_conversion<To, uint16_t>(table, to, "u16");
    add_conversion<To, int16_t>(table, to, "s16");
    add_conversion<To, uint32_t>(table, to, "u32");
    add_conversion<To, int32_t>(table, to, "s32");
    add_conversion<To, uint64_t>(table, to, "u64");
    add_conversion<To, int64_t>(table, to, "s64");
    add_conversion<To, Half>(table, to, "f16");
    add_conversion<To, Brain>(table, to, "bf16");
    add_conversion<To, float>(table, to, "f32");
    add_conversion<To, double>(table, to, "f64");
}

template <class T>
void add_comparisons(Table& table, const std::string& type) {
    table["setp.eq." + type] = compare<T, [](T a, T b) { return a == b; }>;
    table["setp.ne." + type] = compare<T, [](T a, T b) { return a < b || b < a; }>;  // of floats: ordered
    table["setp.lt." + type] = compare<T, [](T a, T b) { return a < b; }>;
    table["setp.le." + type] = compare<T, [](T a, T b) { return a <= b; }>;
    table["setp.gt." + type] = compare<T, [](T a, T b) { return b < a; }>;
    table["setp.ge." + type] = compare<T, [](T a, T b) { return b <= a; }>;
}

template <class T>
void add_bits(Table& table, const std::string& width) {
    using S = std::make_signed_t<T>;
    const std::string b = "b" + width, u = "u" + width, s = "s" + width;
    for (const auto& type : {b, u, s}) {
        table["mov." + type] = unary<T, [](T a) { return a; }>;
        table["selp." + type] = select<T>;
    }
    table["and." + b] = binary<T, [](T a, T b) { return a & b; }>;
    table["or." + b] = binary<T, [](T a, T b) { return a | b; }>;
    table["xor." + b] = binary<T, [](T a, T b) { return a ^ b; }>;
    table["not." + b] = unary<T, [](T a) { return ~a; }>;
    table["shl." + b] = shift_left<T>;
    table["shr." + b] = table["shr." + u] = shift_right<T>;
    table["shr." + s] = shift_right<S>;
    for (const auto& type : {u, s}) {
        table["add." + type] = binary<T, [](T a, T b) { return a + b; }>;
        table["sub." + type] = binary<T, [](T a, T b) { return a - b; }>;
        table["mul.lo." + type] = binary<T, [](T a, T b) { return uint64_t(a) * b; }>;
        table["mad.lo." + type] = ternary<T, [](T a, T b, T c) { return uint64_t(a) * b + c; }>;
    }
    table["neg." + s] = unary<T, [](T a) { return T(0) - a; }>;
    table["min." + u] = binary<T, [](T a, T b) { return a < b ? a : b; }>;
    table["max." + u] = binary<T, [](T a, T b) { return b < a ? a : b; }>;
    table["min." + s] = binary<S, [](S a, S b) { return a < b ? a : b; }>;
    table["max." + s] = binary<S, [](S a, S b) { return b < a ? a : b; }>;
    add_comparisons<T>(table, u);
    add_comparisons<S>(table, s);
    add_comparisons<T>(table, b);
}

template <class T>
bool unordered(T a, T b) {
    return std::isnan(a) || std::isnan(b);
}

template <class T>
void add_floats(Table& table, const std::string& type) {
    table["mov." + type] = unary<T, [](T a) { return a; }>;
    table["selp." + type] = select<T>;
    table["add." + type] = table["add.rn." + type] = binary<T, [](T a, T b) { return a + b; }>;
    table["sub." + type] = table["sub.rn." + type] = binary<T, [](T a, T b) { return a - b; }>;
    table["mul." + type] = table["mul.rn." + type] = binary<T, [](T a, T b) { return a * b; }>;
    table["div.rn." + type] = binary<T, [](T a, T b) { return a / b; }>;
    table["fma.rn." + type] = ternary<T, [](T a, T b, T c) { return std::fma(a, b, c); }>;
    table["sqrt.rn." + type] = unary<T, [](T a) { return std::sqrt(a); }>;
    table["rcp.rn." + type] = unary<T, [](T a) { return T(1) / a; }>;
    table["abs." + type] = unary<T, [](T a) { return std::fabs(a); }>;
    table["neg." + type] = unary<T, [](T a) { return -a; }>;
    table["min." + type] = binary<T, [](T a, T b) { return std::fmin(a, b); }>;
    table["max." + type] = binary<T, [](T a, T b) { return std::fmax(a, b); }>;
    add_comparisons<T>(table, type);
    table["setp.nan." + type] = compare<T, unordered<T>>;
    table["setp.num." + type] = compare<T, [](T a, T b) { return !unordered<T>(a, b); }>;
    table["setp.equ." + type] = compare<T, [](T a, T b) { return !(a < b || b < a); }>;
    table["setp.neu." + type] = compare<T, [](T a, T b) { return !(a == b); }>;
    table["setp.ltu." + type] = compare<T, [](T a, T b) { return !(b <= a); }>;
    table["setp.leu." + type] = compare<T, [](T a, T b) { return !(b < a); }>;
    table["setp.gtu." + type] = compare<T, [](T a, T b) { return !(a <= b); }>;
    table["setp.geu." + type] = compare<T, [](T a, T b) { return !(a < b); }>;
}

uint32_t reversed(uint32_t x) {
    uint32_t result = 0;
    for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1) << (31 - bit);
    return result;
}

uint32_t extracted(uint32_t x, uint32_t position, uint32_t count) {
    position &= 255, count &= 255;
    const uint64_t field = position > 31 ? 0 : uint64_t(x) >> position;
    return uint32_t(count > 31 ? field : field & ((uint64_t(1) << count) - 1));
}

// Byte k of the result is that of the eight in b and a which nibble k of the selector names, or its sign throughout.
uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int k = 0; k < 4; ++k) {
        const uint32_t by = selector >> 4 * k & 15, byte = uint32_t(bytes >> 8 * (by & 7)) & 255;
        result |= (by & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * k;
    }
    return result;
}

Table make_table() {
    Table table;
    add_bits<uint16_t>(table, "16");
    add_bits<uint32_t>(table, "32");
    add_bits<uint64_t>(table, "64");
    add_floats<float>(table, "f32");
    add_floats<double>(table, "f64");
    add_conversions<uint8_t>(table, "u8");
    add_conversions<int8_t>(table, "s8");
    add_conversions<uint16_t>(table, "u16");
    add_conversions<int16_t>(table, "s16");
    add_conversions<uint32_t>(table, "u32");
    add_conversions<int32_t>(table, "s32");
    add_conversions<uint64_t>(table, "u64");
    add_conversions<int64_t>(table, "s64");
    add_conversions<Half>(table, "f16");
    add_conversions<Brain>(table, "bf16");
    add_conversions<float>(table, "f32");
    add_conversions<double>(table, "f64");
    table["mul.wide.u16"] = multiply_wide<uint16_t, uint32_t>;
    table["mul.wide.s16"] = multiply_wide<int16_t, int32_t>;
    table["mul.wide.u32"] = multiply_wide<uint32_t, uint64_t>;
    table["mul.wide.s32"] = multiply_wide<int32_t, int64_t>;
    table["mad.wide.u32"] = multiply_add_wide<uint32_t, uint64_t>;
    table["mad.wide.s32"] = multiply_add_wide<int32_t, int64_t>;
    table["mul.hi.u32"] =
        binary<uint32_t, [](uint32_t a, uint32_t b) { return (uint64_t(a) * b) / (uint64_t(1) << 32); }>;
    table["mov.pred"] = unary<uint8_t, [](uint8_t a) { return a; }>;
    table["and.pred"] = binary<uint8_t, [](uint8_t a, uint8_t b) { return a & b; }>;
    table["or.pred"] = binary<uint8_t, [](uint8_t a, uint8_t b) { return a | b; }>;
    table["not.pred"] = unary<uint8_t, [](uint8_t a) { return !a; }>;
    table["brev.b32"] = unary<uint32_t, reversed>;
    table["bfind.shiftamt.u32"] = unary<uint32_t, [](uint32_t a) { return a ? std::countl_zero(a) : ~0u; }>;
    table["prmt.b32"] = ternary<uint32_t, permuted>;
    table["bfe.u32"] = ternary<uint32_t, extracted>;
    for (const char* name : {"cvta.global.u64", "cvta.to.global.u64", "cvta.shared.u64", "cvta.to.shared.u64"})
        table[name] = unary<uint64_t, [](uint64_t a) { return a; }>;
    // Approximations of the hardware: exact here, or cut to the bits that are promised.
    table["abs.ftz.f32"] = unary<float, [](float a) { return std::fabs(a) < 0x1p-126f ? 0.0f : std::fabs(a); }>;
    table["sqrt.approx.f32"] = unary<float, [](float a) { return std::sqrt(a); }>;
    table["sqrt.approx.ftz.f32"] = unary<float, [](float a) { return std::sqrt(a < 0x1p-126f && a > 0 ? 0.0f : a); }>;
    table["div.full.f32"] = binary<float, [](float a, float b) { return a / b; }>;
    table["rcp.approx.ftz.f64"] = unary<double, [](double a) {
        return std::bit_cast<double>(std::bit_cast<uint64_t>(1.0 / a) & 0xffffffff00000000u);
    }>;
    return table;
}

}  // namespace

Work find_work(const std::string& mnemonic) {
    static const Table table = make_table();
    const auto found = table.find(mnemonic);
    return found == table.end() ? nullptr : found->second;
}

}  // namespace ptx
