// node emscripten_probe.js FOLDER OPERATIONS.json: asks FOLDER/probe.js and prints the answers as JSON.
delete globalThis.fetch; // Emscripten 3.1.6 would use it for files
const fs=require('fs');
const ops=JSON.parse(fs.readFileSync(process.argv[3]));
const quiet={print(){},printErr(){}};
(async()=>{
 const M=await require(require('path').resolve(process.argv[2], 'probe.js'))(quiet);
 const H=()=>new Int32Array(M.asm?M.asm[Object.keys(M.asm).find(k=>M.asm[k] instanceof WebAssembly.Memory)].buffer:0);
 const T=M._tm_ptr()>>2,B=M._buf_ptr();
 const str=s=>{const n=Buffer.byteLength(s)+1,p=M._malloc(n);M.stringToUTF8(s,p,n);return p};
 const get=()=>Array.from(H().subarray(T,T+10));
 const out=[];
 for(const [op,...a] of ops){ let r; try{ switch(op){
  case 'tm': H().set(a[0],T); r=null; break;
  case 'localtime': M._do_localtime(a[0]); r=get(); break;
  case 'gmtime': M._do_gmtime(a[0]); r=get().slice(0,8); break;
  case 'mktime': H().set(a[0],T); r=[M._do_mktime(),get().slice(0,9)]; break;
  case 'timegm': H().set(a[0],T); r=[M._do_timegm(),get().slice(6,8)]; break;
  case 'strftime': {H().set(a[0],T); const n=M._do_strftime(str(a[1]),a[2]); r=[n,n?M.UTF8ToString(B):null]; break;}
  case 'strptime': {H().set(a[0],T); const n=M._do_strptime(str(a[1]),str(a[2])); r=[n,get().slice(0,9)]; break;}
  case 'tz': r=M.UTF8ToString(M._do_tz()); break;
  case 'open': r=M._do_open(str(a[0]),a[1]); break;
  case 'read': {const n=M._do_read(a[0],a[1]); r=[n,n>0?Buffer.from(H().buffer).subarray(B,B+n).toString('latin1'):'']; break;}
  case 'write': r=M._do_write(a[0],a[1]); break;
  case 'seek': r=M._do_seek(...a); break;
  case 'close': r=M._do_close(a[0]); break;
  case 'fcntl': r=M._do_fcntl(...a); break;
  case 'ioctl': r=M._do_ioctl(...a); break;
  case 'env': r=M.UTF8ToString(M._do_env()).replace(/\n_=.*\n/,'\n'); break;
  case 'entropy': r=M._do_entropy(a[0]); break;
  case 'malloc': {const p=M._do_malloc(a[0])>>>0; r=[p!==0, H().buffer.byteLength]; break;}
 }}catch(e){ r='threw '+(e&&e.constructor?e.constructor.name:String(e)); }
 out.push(r)}
 console.log(JSON.stringify(out));
})();
