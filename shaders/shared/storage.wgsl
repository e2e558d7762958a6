// Twin of the storage types of src/real.rs: four float16 or bfloat16 numbers in two words, as vec4<f32> and back.
//
// By integers, so that no device feature is needed and every device rounds to nearest, ties to even.

fn halves(words: vec2<u32>) -> vec4<u32> {
    return vec4<u32>(words.x & 0xffffu, words.x >> 16u, words.y & 0xffffu, words.y >> 16u);
}

fn words(halves: vec4<u32>) -> vec2<u32> {
    return vec2<u32>(halves.x | (halves.y << 16u), halves.z | (halves.w << 16u));
}

fn from_f32(x: vec4<f32>) -> vec4<f32> {
    return x;
}

fn to_f32(x: vec4<f32>) -> vec4<f32> {
    return x;
}

fn from_bf16(stored: vec2<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(halves(stored) << vec4<u32>(16u));
}

fn to_bf16(x: vec4<f32>) -> vec2<u32> {
    let bits = bitcast<vec4<u32>>(x);
    let rounded = (bits + vec4<u32>(0x7fffu) + ((bits >> vec4<u32>(16u)) & vec4<u32>(1u))) >> vec4<u32>(16u);
    let quiet = (bits >> vec4<u32>(16u)) | vec4<u32>(0x40u);
    return words(select(rounded, quiet, is_nan(x)));
}

fn from_f16(stored: vec2<u32>) -> vec4<f32> {
    let h = halves(stored);
    let sign = (h & vec4<u32>(0x8000u)) << vec4<u32>(16u);
    let magnitude = h & vec4<u32>(0x7fffu);
    let normal = (magnitude << vec4<u32>(13u)) + vec4<u32>(112u << 23u);
    let subnormal = bitcast<vec4<u32>>(vec4<f32>(magnitude) * vec4<f32>(5.9604644775390625e-8));
    let special = (magnitude << vec4<u32>(13u)) | vec4<u32>(0x7f800000u);
    let finite = select(normal, subnormal, magnitude < vec4<u32>(0x400u));
    return bitcast<vec4<f32>>(sign | select(finite, special, magnitude >= vec4<u32>(0x7c00u)));
}

fn to_f16(x: vec4<f32>) -> vec2<u32> {
    let bits = bitcast<vec4<u32>>(x);
    let sign = (bits >> vec4<u32>(16u)) & vec4<u32>(0x8000u);
    let magnitude = bits & vec4<u32>(0x7fffffffu);
    let odd = (magnitude >> vec4<u32>(13u)) & vec4<u32>(1u);
    let normal = (magnitude + vec4<u32>(0xfffu) + odd - vec4<u32>(112u << 23u)) >> vec4<u32>(13u);
    // Half of a unit in the last place of 0.5 is that of the smallest subnormal number: the sum rounds.
    let small = bitcast<vec4<u32>>(bitcast<vec4<f32>>(magnitude) + vec4<f32>(0.5)) - vec4<u32>(0x3f000000u);
    let finite = select(normal, small, magnitude < vec4<u32>(0x38800000u));
    let bounded = select(finite, vec4<u32>(0x7c00u), magnitude >= vec4<u32>(0x477ff000u));
    return words(sign | select(bounded, vec4<u32>(0x7e00u), is_nan(x)));
}
