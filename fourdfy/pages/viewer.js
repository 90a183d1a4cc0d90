// Shows the GLB that fourdfy writes: vertex colours or a texture, morph targets or one mesh for each moment.
// Drag to turn, wheel or two fingers to come nearer, double click to begin again.

const VERTEX = `#version 300 es
uniform mat4 camera; uniform vec2 share;
in vec3 position, before, after; in vec4 color; in vec2 uv;
out vec3 place; out vec3 light; out vec2 texel;
void main() {
  place = position + share.x * before + share.y * after;
  light = color.rgb; texel = uv;
  gl_Position = camera * vec4(place, 1.0);
}`;
const FRAGMENT = `#version 300 es
precision highp float;
uniform sampler2D image; uniform bool textured, lit; uniform vec3 eye;
in vec3 place; in vec3 light; in vec2 texel;
out vec4 shown;
void main() {
  // Vertex colours are linear light, textures are sRGB.
  vec3 srgb = textured ? texture(image, texel).rgb
    : mix(light * 12.92, 1.055 * pow(max(light, 1e-6), vec3(1.0 / 2.4)) - 0.055, step(0.0031308, light));
  vec3 normal = normalize(cross(dFdx(place), dFdy(place)));
  float facing = abs(dot(normal, normalize(eye - place)));
  shown = vec4(srgb * (lit ? 0.45 + 0.55 * facing : 1.0), 1.0);
}`;

function readGlb(bytes) {
  const view = new DataView(bytes.buffer), length = view.getUint32(12, true);
  const gltf = JSON.parse(new TextDecoder().decode(bytes.subarray(20, 20 + length)));
  const start = 20 + length + 8;
  const KINDS = { 5123: Uint16Array, 5125: Uint32Array, 5126: Float32Array }, WIDTHS = { SCALAR: 1, VEC2: 2, VEC3: 3, VEC4: 4 };
  const part = index => {
    const { byteOffset, byteLength } = gltf.bufferViews[index];
    return bytes.subarray(start + byteOffset, start + byteOffset + byteLength);
  };
  const array = index => {
    const { bufferView, componentType, count, type } = gltf.accessors[index], data = part(bufferView);
    return new KINDS[componentType](data.buffer, data.byteOffset, count * WIDTHS[type]);
  };
  return { gltf, part, array };
}

function showModel(canvas, bytes) {
  const gl = canvas.getContext("webgl2", { antialias: true });
  if (!gl) return canvas.replaceWith("This browser has no WebGL 2 to show the model.");
  const { gltf, part, array } = readGlb(bytes), program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  gl.useProgram(program);
  const place = name => gl.getUniformLocation(program, name);

  const uploaded = new Map();
  const upload = (index, target) => {
    if (!uploaded.has(index)) {
      uploaded.set(index, gl.createBuffer());
      gl.bindBuffer(target, uploaded.get(index));
      gl.bufferData(target, array(index), gl.STATIC_DRAW);
    }
    gl.bindBuffer(target, uploaded.get(index));
  };
  const attribute = (name, index) => {
    const at = gl.getAttribLocation(program, name);
    if (at < 0) return;
    if (index === undefined) {
      gl.disableVertexAttribArray(at);
      gl.vertexAttrib4f(at, ...(name === "color" ? [1, 1, 1, 1] : [0, 0, 0, 0]));
      return;
    }
    const { type, componentType, normalized } = gltf.accessors[index];
    upload(index, gl.ARRAY_BUFFER);
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, Number(type[3]), componentType, Boolean(normalized), 0, 0);
  };

  const material = gltf.materials[0], texture = material.pbrMetallicRoughness.baseColorTexture;
  gl.uniform1i(place("textured"), texture ? 1 : 0);
  gl.uniform1i(place("lit"), material.extensions ? 0 : 1);
  if (texture) {
    const image = gltf.images[gltf.textures[texture.index].source];
    createImageBitmap(new Blob([part(image.bufferView)], { type: image.mimeType })).then(pixels => {
      gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
      gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGB, gl.RGB, gl.UNSIGNED_BYTE, pixels);
      gl.generateMipmap(gl.TEXTURE_2D);
      gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE);
      gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE);
      draw();
    });
  }

  // The box around all that is ever seen.
  const shapes = gltf.nodes.map((node, index) => ({ node: index, of: node.mesh })).filter(shape => shape.of !== undefined);
  const boxes = gltf.meshes.map(mesh => gltf.accessors[mesh.primitives[0].attributes.POSITION]);
  const low = [0, 1, 2].map(i => Math.min(...boxes.map(box => box.min[i])));
  const high = [0, 1, 2].map(i => Math.max(...boxes.map(box => box.max[i])));
  const middle = low.map((value, i) => (value + high[i]) / 2), size = Math.hypot(...low.map((value, i) => high[i] - value)) / 2;

  const channels = (gltf.animations?.[0].channels ?? []).map(({ sampler, target }) => {
    const { input, output } = gltf.animations[0].samplers[sampler];
    return { ...target, keys: array(input), values: array(output) };
  });
  const NARROW = 2 * Math.asin(1 / 3.2);
  if (channels.length) data.seconds = channels[0].keys[channels[0].keys.length - 1];
  let view, at = 0;
  const rest = () => { view = { azimuth: 0, elevation: 0.26, distance: 3.2 * size }; };
  rest();

  function camera() {
    // A model that does not move turns with time instead.
    const azimuth = view.azimuth + (channels.length ? 0 : 2 * Math.PI * at);
    const [s, c, se, ce] = [Math.sin(azimuth), Math.cos(azimuth), Math.sin(view.elevation), Math.cos(view.elevation)];
    const right = [c, 0, -s], up = [-s * se, ce, -c * se], back = [s * ce, se, c * ce];
    const eye = middle.map((value, i) => value + view.distance * back[i]);
    const dot = a => -(a[0] * eye[0] + a[1] * eye[1] + a[2] * eye[2]);
    const near = view.distance / 50, far = view.distance + 2 * size, f = 1 / Math.tan(NARROW / 2);
    const x = f / (canvas.width / canvas.height), z = (far + near) / (near - far), w = 2 * far * near / (near - far);
    gl.uniform3fv(place("eye"), eye);
    gl.uniformMatrix4fv(place("camera"), false, [0, 1, 2].flatMap(i => [x * right[i], f * up[i], z * back[i], -back[i]])
      .concat([x * dot(right), f * dot(up), z * dot(back) + w, -dot(back)]));
  }

  function draw() {
    const sharpness = Math.min(devicePixelRatio, 2);
    [canvas.width, canvas.height] = [canvas.clientWidth * sharpness, canvas.clientHeight * sharpness];
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.enable(gl.DEPTH_TEST);
    gl.clearColor(0.8, 0.8, 0.8, 1);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    camera();
    for (const { node, of } of shapes) {
      const { attributes, indices, targets = [] } = gltf.meshes[of].primitives[0];
      const channel = channels.find(channel => channel.node === node);
      let before, after, share = 0;
      if (channel) {
        const { keys, values, path } = channel, time = at * keys[keys.length - 1];
        let key = 0;
        while (key + 2 < keys.length && keys[key + 1] <= time) key++;
        if (path === "scale" && !values[3 * key]) continue;
        if (path === "weights") { // key k is target k - 1 in full
          [before, after] = [targets[key - 1]?.POSITION, targets[key].POSITION];
          share = (time - keys[key]) / (keys[key + 1] - keys[key]);
        }
      }
      gl.uniform2f(place("share"), before === undefined ? 0 : 1 - share, share);
      attribute("position", attributes.POSITION);
      attribute("before", before);
      attribute("after", after);
      attribute("color", attributes.COLOR_0);
      attribute("uv", attributes.TEXCOORD_0);
      upload(indices, gl.ELEMENT_ARRAY_BUFFER);
      gl.drawElements(gl.TRIANGLES, gltf.accessors[indices].count, gltf.accessors[indices].componentType, 0);
    }
  }

  const fingers = new Map();
  const spread = () => { const [a, b] = [...fingers.values()]; return Math.hypot(a.x - b.x, a.y - b.y); };
  const nearer = by => { view.distance = Math.min(Math.max(view.distance * by, size), 10 * size); };
  canvas.addEventListener("pointerdown", event => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  canvas.addEventListener("pointermove", event => {
    const last = fingers.get(event.pointerId), now = { x: event.clientX, y: event.clientY };
    if (!last) return;
    const wide = fingers.size === 2 ? spread() : 0;
    fingers.set(event.pointerId, now);
    if (wide) nearer(wide / spread());
    else {
      view.azimuth -= (now.x - last.x) * 0.01;
      view.elevation = Math.min(Math.max(view.elevation + (now.y - last.y) * 0.01, -1.5), 1.5);
    }
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, event => fingers.delete(event.pointerId));
  canvas.addEventListener("wheel", event => { event.preventDefault(); nearer(Math.exp(event.deltaY * 0.001)); draw(); }, { passive: false });
  canvas.addEventListener("dblclick", () => { rest(); draw(); });
  addEventListener("resize", draw);
  shows.push(now => { at = now; draw(); });
  showAll();
}

async function unpackAndShow(canvas) {
  const packed = new Blob([Uint8Array.from(atob(data.model), letter => letter.charCodeAt(0))]);
  const unpacked = packed.stream().pipeThrough(new DecompressionStream("gzip")); // not in browsers before 2023
  showModel(canvas, new Uint8Array(await new Response(unpacked).arrayBuffer()));
}

const model = document.getElementById("model");
unpackAndShow(model).catch(error => model.replaceWith(`The model can't be shown (${error.message}).`));
